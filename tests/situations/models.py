"""Models, inputs and comparisons of the situations."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.situations.methods import Method
from tests.tiny_models import tiny_inputs, tiny_model

FILE = "adapter_model.safetensors"


def classifier(labels: int = 3) -> PreTrainedModel:
    model = tiny_model("bert")
    if labels != 3:
        torch.manual_seed(0)
        model.classifier = nn.Linear(32, labels)
        model.num_labels = model.config.num_labels = labels
    return model


def decoder(tokens: int = 64, tied: bool = False) -> PreTrainedModel:
    """A small Llama, with more tokens than it came with if asked for."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tied, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if tokens != 64:
        torch.manual_seed(1)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def network(change: Any = None) -> nn.Sequential:
    """Two linear layers, the first of them changed."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(16, 16), act=nn.ReLU(), last=nn.Linear(16, 4))).eval()
    if change is not None:
        change(model.first)
    return model


@torch.no_grad()
def logits(model: nn.Module, **more: Any) -> torch.Tensor:
    """What a model computes on inputs that are always the same."""
    model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, nn.Sequential):
        torch.manual_seed(3)
        return model(torch.randn(3, 16).to(base.last.weight.dtype))
    return model(**tiny_inputs(base), **more).logits


def saved(method: Method, base: nn.Module, folder: Path, **fields: Any) -> torch.Tensor:
    """Save a changed adapter of a base model; what it computes."""
    model = get_peft_model(base, method.changed(**fields))
    computed = logits(model)
    model.save_pretrained(folder)
    return computed


def comes_back(method: Method, make: Any, folder: Path, **fields: Any) -> bool:
    """Whether an adapter that was saved and loaded computes what it did, to the bit."""
    computed = saved(method, make(), folder, **fields)
    return torch.equal(logits(PeftModel.from_pretrained(make(), folder)), computed)


def damage(folder: Path, part: str) -> None:
    """Change the first tensor in an adapter's file whose name has this part: a value, or a byte."""
    tensors = load_file(folder / FILE)
    name = next(name for name in sorted(tensors) if part in name)
    flat = tensors[name].view(-1).view(torch.uint8)
    flat[len(flat) // 2] ^= 0x20
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
