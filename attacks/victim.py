"""The model that is attacked, good adapters of it, and what must be as before afterwards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from peft_mask import MaskConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"
PADDED = "bert.encoder.layer.0.output.dense"  # 32 x 159 weights: the rows of its bits end in padding
HEAD = "classifier"

# codec -> what makes the adapter's records be of it
CODECS = {"gaps": {}, "bits": {"target_sparsity": 0.49}, "ranks": {"portable": False, "candidates": 0.1}}


def base_model(seed: int = 0) -> nn.Module:
    """A BERT of one layer with a head of three labels, in eval mode."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=159,
        max_position_embeddings=32,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def save_adapter(folder: Path, codec: str = "gaps", seed: int = 0, base_seed: int = 0, **fields: object) -> Path:
    """Save an adapter of the model with random masks and a random head."""
    settings = {"target_sparsity": 0.05, "candidates": None, "init_weights": False, "seed": seed} | CODECS[codec]
    model = get_peft_model(base_model(base_seed), MaskConfig(**({"task_type": "SEQ_CLS"} | settings | fields)))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    with quiet():
        model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> Tensor:
    """What the model computes for one fixed batch."""
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7) + 3).logits


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base model's tensors by their own names, whatever is wrapped around them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "peft_mask_" not in name and "modules_to_save." not in name:
            found[re.sub(r"^base_model\.model\.|\.base_layer|\.original_module|\.token_adapter", "", name)] = (
                tensor.clone()
            )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT and transformers say about adapters that are odd on purpose."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
