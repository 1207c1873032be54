"""What the runs of docs/gpu-runs.md take, by the estimate of `training_memory`: masks of gates, and full fine-tuning.

python -m benchmarks.gpu_runs

Nothing is trained, and no model need exist; seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cards import LLAMAS, usable
from benchmarks.harness import report, table
from peft_mask import MaskConfig, TrainingMemory, training_memory
from peft_mask.analysis import masked_shapes, storage
from peft_mask.training.memory import saved_sizes

SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
# the shapes of these models' own configurations
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-360M": SMOLLM2
    | {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "SmolLM2-1.7B": SMOLLM2
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
    },
    "Llama-3.2-3B": {"model_type": "llama"} | LLAMAS["3B"],
    "Llama-3.1-8B": {"model_type": "llama"} | LLAMAS["8B"],
}
SPARSITIES = (0.002, 0.0005)
BATCHES = {"SFT": (4, 1024), "GRPO": (8, 768)}  # rows and tokens of a step
GENERATED = 64  # completions of a GRPO step, which TRL makes at once and then learns from in eight batches
METAMATH = ("Llama-3.2-3B", (4, 768))  # the base of PEFT's comparison, and the longest batch it may meet
CARDS = (24, 80)  # GiB
FULL = "full fine-tuning"
FULL_DTYPES = {"bfloat16": 2, "float32": 4}  # of weights, gradients and moments


def gates(sparsity: float) -> MaskConfig:
    """The configuration of a run: gate projections alone, as in Deletion Tuning."""
    return MaskConfig.gates(task_type="CAUSAL_LM", target_sparsity=sparsity)


def made(shape: dict[str, Any], checkpointing: bool = True) -> nn.Module:
    """A model without weights, in bfloat16."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def of_mask(shape: dict[str, Any], rows: int, tokens: int, checkpointing: bool = True) -> TrainingMemory:
    return training_memory(made(shape, checkpointing), gates(SPARSITIES[0]), batch(rows, tokens))


def of_full(shape: dict[str, Any], rows: int, tokens: int, itemsize: int) -> int:
    """Weights, gradients and AdamW's two moments, of so many bytes each, and activations in bfloat16."""
    model = made(shape)
    kept = saved_sizes(model, batch(rows, tokens))
    return 4 * itemsize * sum(p.numel() for p in model.parameters()) + sum(kept) + 2 * max(kept)


def cache_bytes(shape: dict[str, Any], rows: int, tokens: int) -> int:
    """Bytes of keys and values, in bfloat16, of rows that are generated together."""
    config = AutoConfig.for_model(**shape)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * int(config.num_hidden_layers * config.num_key_value_heads * head) * rows * tokens


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def cards_for(size: int) -> str:
    return next((f"{card} GB" for card in CARDS if size <= usable(card)), "none of them")


def figures_of(shape: dict[str, Any]) -> dict[str, Any]:
    model = made(shape)
    steps = {f"{task}, mask": of_mask(shape, *sizes).total for task, sizes in BATCHES.items()}
    steps |= {f"SFT, {FULL} in {dtype}": of_full(shape, *BATCHES["SFT"], size) for dtype, size in FULL_DTYPES.items()}
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "masked": sum(masked.numel() for masked in masked_shapes(model, gates(SPARSITIES[0])).values()),
        "file_bytes": {percent(s): storage(model, gates(s), s).mask for s in SPARSITIES},
        "step_bytes": steps,
        "cache_bytes": cache_bytes(shape, GENERATED, BATCHES["GRPO"][1]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(arguments)
    figures = {name: figures_of(MODELS[name]) for name in options.models}
    masks = [
        (
            name,
            f"{f['masked'] / 1e6:,.0f} M",
            *(f"{100 * f['masked'] * s / f['weights']:.3f} %" for s in SPARSITIES),
            *(f"{size / 1e6:.2f}" for size in f["file_bytes"].values()),
        )
        for name, f in figures.items()
    ]
    steps = [
        (
            name,
            *(f"{size / 2**30:.1f} ({cards_for(size)})" for size in f["step_bytes"].values()),
            f"{f['cache_bytes'] / 2**30:.1f}",
        )
        for name, f in figures.items()
    ]
    base, longest = METAMATH
    comparison = of_mask(MODELS[base], *longest, checkpointing=False)
    shares = [percent(s) for s in SPARSITIES]
    sizes = {task: f"{rows} x {tokens:,} tokens" for task, (rows, tokens) in BATCHES.items()}
    body = (
        f"Gate projections are masked, {shares[0]} or {shares[1]} of their weights off. MB are 10^6 bytes, of the file "
        "to expect.\n\n"
        + table(
            ("model", "masked", *(f"off, of all weights, at {s}" for s in shares), *(f"MB at {s}" for s in shares)),
            masks,
        )
        + "\n\nGiB of a training step by the estimate of `training_memory`, and the smaller card of "
        f"{' and '.join(map(str, CARDS))} GB that it fits, a GiB and a twentieth set aside: a base in bfloat16, scores "
        f"in float32, activations checkpointed; SFT on {sizes['SFT']} a step, GRPO on {sizes['GRPO']}. Full "
        "fine-tuning holds four numbers a weight; in bfloat16 a step below a 512th of its weight is lost in rounding. "
        f"The last column is what keys and values of the {GENERATED} completions of a GRPO step "
        "take while they are generated, GiB. Nothing of it was measured on a GPU.\n\n"
        + table(("model", *next(iter(figures.values()))["step_bytes"], "keys and values"), steps)
        + f"\n\nA step of PEFT's MetaMathQA comparison, {base} without checkpointing, takes at most "
        f"{comparison.total / 2**30:.1f} GiB, on {longest[0]} x {longest[1]} tokens: {comparison}."
    )
    results = {"models": figures, "metamath": vars(comparison)}
    report("gpu-runs", "What the runs for a GPU take, estimated", body, results, options.results)


if __name__ == "__main__":
    main()
