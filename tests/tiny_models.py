"""Tiny random models of every architecture the package promises, made on the spot: two layers of width 32.

    model = tiny_model("bert", "seq_cls")
    logits = model(**tiny_inputs(model)).logits

The width of the feed-forward layers, 60, is no multiple of 8 on purpose: packed rows then end in padding bits.
"""

import inspect
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE, PAD, BOS, EOS = 64, 1, 0, 2
NUM_LABELS = 3

_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_BERT = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 60,
    "max_position_embeddings": 64,
}
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_SEQ2SEQ = {**_TOKENS, "decoder_start_token_id": PAD}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 60,
    "image_size": 8,
    "patch_size": 4,
}

# family -> (transformers' model_type, what its config is made of)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "distilbert": (
        "distilbert",
        {**_TOKENS, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 60, "max_position_embeddings": 64},
    ),
    "mpnet": ("mpnet", _BERT),
    "deberta-v2": (
        "deberta-v2",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "electra": ("electra", {**_BERT, "embedding_size": 16}),
    "modernbert": ("modernbert", {**_BERT, "cls_token_id": BOS, "sep_token_id": EOS, "global_attn_every_n_layers": 2}),
    "gpt2": ("gpt2", {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 60, "n_positions": 64}),
    "opt": (
        "opt",
        {
            **_TOKENS,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 60,
            "max_position_embeddings": 64,
        },
    ),
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "mistral": ("mistral", _LLAMA),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16}),
    "t5": (
        "t5",
        {**_SEQ2SEQ, "d_model": 32, "d_kv": 16, "d_ff": 60, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    ),
    "bart": (
        "bart",
        {
            **_SEQ2SEQ,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 60,
            "decoder_ffn_dim": 60,
            "max_position_embeddings": 64,
        },
    ),
    "vit": ("vit", _VISION),
    "clip": ("clip", {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 16}),
}

FAMILIES = tuple(_CONFIGS)

# head -> the auto classes that may have it; the first that knows the family builds it
_HEADS = {
    "base": (AutoModel,),
    "seq_cls": (AutoModelForSequenceClassification, AutoModelForImageClassification),
    "token_cls": (AutoModelForTokenClassification,),
    "lm": (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM),
}


def tiny_config(family: str) -> PretrainedConfig:
    model_type, settings = _CONFIGS[family]
    return AutoConfig.for_model(model_type, num_labels=NUM_LABELS, **settings)


def tiny_heads(family: str) -> tuple[str, ...]:
    """The heads transformers has for `family`, of "base", "seq_cls" (images for vit and clip), "token_cls" and "lm"."""
    config_class = type(tiny_config(family))
    return tuple(head for head, autos in _HEADS.items() if any(config_class in auto._model_mapping for auto in autos))


def tiny_model(family: str, head: str = "seq_cls", seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode: the same weights for the same arguments; torch's global generator is left alone."""
    config = tiny_config(family)
    for auto in _HEADS[head]:
        if type(config) in auto._model_mapping:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return auto.from_config(config).eval()
    raise ValueError(f"transformers has no {head!r} head for {family!r}; it has {tiny_heads(family)}")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for these models whose words are w0, w1 and so on; w3 stands for all other words."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=f"w{BOS}", pad_token=f"w{PAD}", eos_token=f"w{EOS}", unk_token="w3"
    )


def tiny_inputs(
    model: torch.nn.Module, batch_size: int = 2, length: int = 7, labels: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Keyword arguments for `model(**inputs)`, PEFT's wrapper included; the last row of text ends in padding.

    `labels=True` adds the labels for which the model returns a loss (a base model takes none).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = _head_of(base)
    takes = inspect.signature(base.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}

    if "input_ids" in takes:
        ids = torch.randint(max(PAD, BOS, EOS) + 1, VOCAB_SIZE, (batch_size, length), generator=generator)
        lengths = torch.full((batch_size, 1), length)
        if batch_size > 1:
            lengths[-1] = max(length - 2, 1)
        positions = torch.arange(length)
        ids = ids.masked_fill(positions == lengths - 1, EOS).masked_fill(positions >= lengths, PAD)
        inputs |= {"input_ids": ids, "attention_mask": (positions < lengths).long()}
        if base.config.is_encoder_decoder and head in ("base", "lm"):
            inputs["decoder_input_ids"] = ids.roll(1, dims=1)
    if "pixel_values" in takes:
        inputs["pixel_values"] = torch.randn(batch_size, 3, 8, 8, generator=generator)

    if labels and head == "lm":
        inputs["labels"] = ids.masked_fill(ids == PAD, -100)
    elif labels and head == "base":
        raise ValueError(f"{type(base).__name__} has no head and takes no labels")
    elif labels:
        shape = (batch_size, length) if head == "token_cls" else (batch_size,)
        inputs["labels"] = torch.randint(NUM_LABELS, shape, generator=generator)
    return inputs


def _head_of(model: torch.nn.Module) -> str:
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return "seq_cls"
    if name.endswith("ForTokenClassification"):
        return "token_cls"
    return "lm" if name.endswith(("LM", "LMHeadModel", "ForConditionalGeneration")) else "base"
