"""What trains on what card, by the estimate of `training_memory`: the longest row of tokens that fits.

python -m benchmarks.cards

Llamas of 1B, 3B and 8B, in bfloat16 and in 4 bits, none of which need exist; masks, LoRA r=8 and full fine-tuning.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import report, table
from benchmarks.memory import LLAMA_1B, MASKS
from peft_mask import MaskConfig, TrainingMemory, training_memory
from peft_mask.training.cards import SHORTEST, quantize_shapes, usable
from peft_mask.training.cards import longest as longest_row
from peft_mask.training.memory import model_bytes, saved_sizes

# as in Llama 3.2 and 3.1
LLAMAS: dict[str, dict[str, Any]] = {
    "1B": LLAMA_1B,
    "3B": LLAMA_1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "8B": LLAMA_1B
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}
BASES = ("bfloat16", "nf4")
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GiB
CONTEXT = 128 * 1024  # tokens: what these models are made for
MASKED = [name for name, (fields, optimizer) in MASKS.items() if "candidates" not in fields and optimizer != "adamw"]
VARIANTS = (*MASKED, "LoRA r=8", "full fine-tuning")


def llama(shape: dict[str, Any], base: str) -> nn.Module:
    """A model without weights that checkpoints activations; in "nf4" all linear layers of its blocks are in 4 bits."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16)
    if base == "nf4":
        quantize_shapes(model.model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def row(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def of_mask(shape: dict[str, Any], base: str, fields: dict[str, Any], optimizer: str, tokens: int) -> TrainingMemory:
    return training_memory(llama(shape, base), MaskConfig(task_type="CAUSAL_LM", **fields), row(tokens), optimizer)


def of_lora(shape: dict[str, Any], base: str, tokens: int) -> TrainingMemory:
    """LoRA r=8 on every linear layer, in float32 as PEFT has it; over 4 bits it keeps what it keeps over 16."""
    model: Any = llama(shape, "bfloat16")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    largest = max(2 * m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    trained = 4 * sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    kept = saved_sizes(wrapped, row(tokens))
    held, weight = model_bytes(llama(shape, base)), largest if base == "nf4" else 0  # dequantized, one at a time
    return TrainingMemory(held, trained, trained, 2 * trained, sum(kept), weight + 2 * max(kept))


def of_full(shape: dict[str, Any], tokens: int) -> TrainingMemory:
    """AdamW whose moments have the dtype of the weights, as transformers does it by default."""
    model = llama(shape, "bfloat16")
    weights = sum(p.nbytes for p in model.parameters())
    kept = saved_sizes(model, row(tokens))
    return TrainingMemory(model_bytes(model), 0, weights, 2 * weights, sum(kept), 2 * max(kept))


def estimate(shape: dict[str, Any], base: str, variant: str, tokens: int) -> TrainingMemory:
    """What a step takes on one row of tokens."""
    if variant == "full fine-tuning":
        return of_full(shape, tokens)
    if variant == "LoRA r=8":
        return of_lora(shape, base, tokens)
    return of_mask(shape, base, *MASKS[variant], tokens)


def longest(room: float, needs: Callable[[int], int]) -> int:
    return longest_row(room, needs, CONTEXT)


def written(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "does not fit"


def card_rows(shapes: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], dict[str, dict[int, int]]]:
    rows, figures = [], {}
    for (name, shape), base, variant in product(shapes.items(), BASES, VARIANTS):
        if variant == "full fine-tuning" and base == "nf4":
            continue
        needs = cache(lambda n, shape=shape, base=base, variant=variant: estimate(shape, base, variant, n).total)
        found = {card: longest(usable(card), needs) for card in CARDS}
        figures[f"{name}/{base}/{variant}"] = found
        rows.append((f"Llama {name}", base, variant, *(written(tokens) for tokens in found.values())))
    return rows, figures


def state_rows(shape: dict[str, Any]) -> tuple[list[tuple[str, ...]], dict[str, dict[str, int]]]:
    """Bytes that a training holds beside the base throughout, whatever the batch."""
    rows, figures = [], {}
    for base, variant in product(BASES, (*MASKED, "LoRA r=8")):
        memory = estimate(shape, base, variant, SHORTEST)
        parts = {
            "scores and positions, or LoRA's matrices": memory.scores,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
        }
        figures[f"{base}/{variant}"] = parts | {"sum": sum(parts.values()), "base": memory.parameters}
        rows.append((base, variant, *(f"{size / 1e9:.2f}" for size in figures[f"{base}/{variant}"].values())))
    return rows, figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LLAMAS, default=[*LLAMAS])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    rows, cards = card_rows({name: LLAMAS[name] for name in args.models})
    largest = args.models[-1]
    held, state = state_rows(LLAMAS[largest])
    body = (
        "The longest row of tokens, one a step, with gradient checkpointing, that fits a card of so many GiB by the "
        "estimate of `training_memory`; for LoRA and full fine-tuning the same is counted. Of a card 1 GiB is set "
        "aside for CUDA's context and libraries, and 5 % for what is lost between blocks of memory. Llama 3.2 of 1B "
        f"and 3B, 3.1 of 8B: rows end at {CONTEXT:,} tokens, for which they are made, and are multiples of {SHORTEST}. "
        "In nf4 the linear layers of all blocks are in 4 bits with nested scales, all else is in bfloat16. LoRA's "
        "matrices and the scores that are not called bfloat16 are float32; full fine-tuning has AdamW's moments in "
        "bfloat16, and none is possible in nf4. Attention is that of a GPU's fused kernels. No GPU was at hand: "
        "nothing of this was measured on one. Of a small Llama the estimate is 1.01 to 1.03 times what a simulated "
        "device counts, and 1.11 to 1.14 with checkpointing, as logits and the gradients of all scores are not there "
        "at the same time (`tests/project/test_simulated_device.py`).\n\n"
        + table(("model", "base", "variant", *(f"{card} GB" for card in CARDS)), rows)
        + f"\n\nWhat is held beside a Llama of {largest} throughout, whatever the batch, in 10^9 bytes; the positions "
        "of weights that are off, found once for each step, are 0.02 bytes a masked weight more.\n\n"
        + table(("base", "variant", *next(iter(state.values()))), held)
    )
    report("cards", "What trains on what card, estimated", body, {"tokens": cards, "state": state}, args.results)


if __name__ == "__main__":
    main()
