"""What training takes by the estimate of `training_memory`, for models that need not exist: masks, LoRA r=8, full.

python -m benchmarks.memory
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.harness import report, table
from peft_mask import MaskConfig, training_memory
from peft_mask.training.memory import saved_bytes

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
# name -> (how it is made, dtype of the base, task type, rows and tokens of a batch)
MODELS: dict[str, tuple[Any, dict[str, Any], torch.dtype, str | None, tuple[int, int]]] = {
    "BERT-base, 32 x 32": (
        AutoModelForSequenceClassification,
        {"model_type": "bert"},
        torch.float32,
        "SEQ_CLS",
        (32, 32),
    ),
    "Llama 1B, 1 x 512": (AutoModelForCausalLM, {"model_type": "llama", **LLAMA_1B}, torch.bfloat16, None, (1, 512)),
    "Llama 7B, 1 x 512": (AutoModelForCausalLM, {"model_type": "llama"}, torch.bfloat16, None, (1, 512)),
}
# name -> (fields of the configuration, optimizer of the scores by the names of `training_memory`)
MASKS: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({}, "sign"),
    "mask, scores in bfloat16": ({"scores_dtype": "bfloat16"}, "sign"),
    "mask, scores in bfloat16, steps in the backward pass": ({"scores_dtype": "bfloat16"}, "sign_in_backward"),
    "mask, AdamW": ({}, "adamw"),
    "mask, all weights, bfloat16": ({"candidates": None, "scores_dtype": "bfloat16"}, "sign"),
    "mask, all weights, bfloat16, steps in the backward pass": (
        {"candidates": None, "scores_dtype": "bfloat16"},
        "sign_in_backward",
    ),
    "mask, all weights, AdamW": ({"candidates": None}, "adamw"),
}


def make(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    auto, shape, dtype, _, batch = MODELS[name]
    with torch.device("meta"):
        config = AutoConfig.for_model(**shape)
        model = auto.from_config(config, dtype=dtype).train()
        labels = torch.zeros(batch if auto is AutoModelForCausalLM else batch[0], dtype=torch.long)
        return model, {"input_ids": torch.zeros(batch, dtype=torch.long), "labels": labels}


def full_bytes(name: str) -> int:
    """Full fine-tuning with AdamW whose moments have the dtype of the weights, as `transformers` does it by default."""
    model, inputs = make(name)
    return 4 * sum(p.nbytes for p in model.parameters()) + saved_bytes(model, inputs)


def lora_bytes(name: str) -> int:
    """LoRA r=8 on every linear layer, its parameters, gradients and AdamW in float32."""
    model, inputs = make(name)
    config = LoraConfig(task_type=MODELS[name][3], r=8, lora_alpha=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return frozen + 16 * trained + saved_bytes(model, inputs)


def mask_bytes(name: str, variant: str) -> int:
    fields, optimizer = MASKS[variant]
    model, inputs = make(name)
    memory = training_memory(model, MaskConfig(task_type=MODELS[name][3], **fields), inputs, optimizer)
    return memory.total - memory.transient  # the others have such tensors too, and they are not counted there


def main() -> None:
    figures: dict[str, dict[str, int]] = {}
    for name in MODELS:
        figures[name] = {"full fine-tuning": full_bytes(name), "LoRA r=8": lora_bytes(name)}
        figures[name] |= {variant: mask_bytes(name, variant) for variant in MASKS}
    variants = list(next(iter(figures.values())))
    rows = [
        (
            variant,
            *(f"{size[variant] / 2**30:.2f} ({size[variant] / size['LoRA r=8']:.2f})" for size in figures.values()),
        )
        for variant in variants
    ]
    body = (
        "Base model, what is trained, its gradients and optimizer states, and the activations kept for the backward "
        "pass (no checkpointing), counted on the meta device; GiB, and in brackets times LoRA r=8. BERT in float32, "
        "Llama in bfloat16, float32 scores and LoRA matrices. What lives for one layer only is left out for all.\n\n"
        + table(("", *figures), rows)
    )
    report("memory", "Training memory, estimated", body, figures)


if __name__ == "__main__":
    main()
