"""A training step of large Llamas on long rows, checkpointed: masks, LoRA r=8, full fine-tuning; time and peak memory.

python -m benchmarks.llama_step --device cuda

One model is made after another, for no card holds all of them; what a card does not hold at all is said to not fit.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.cards import LLAMAS, of_full, of_lora, of_mask
from benchmarks.harness import peak_bytes, report, table, wait_for
from benchmarks.llama import base_model, bytes_of
from peft_mask import MaskConfig, SignAdamW, create_mask_optimizer

# name -> (fields of the configuration, optimizer of the scores by the names of `training_memory`)
MASKS: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({}, "sign"),
    "mask, all tokens": ({"gradient_tokens": 1.0}, "sign"),
    "mask, half of the tokens": ({"gradient_tokens": 0.5}, "sign"),
    "mask, a quarter of the tokens": ({"gradient_tokens": 0.25}, "sign"),
    "mask, scores in bfloat16": ({"scores_dtype": "bfloat16"}, "sign"),
    "mask, scores in bfloat16, steps in the backward pass": ({"scores_dtype": "bfloat16"}, "sign_in_backward"),
}
LORA, FULL = "LoRA r=8", "full fine-tuning"
VARIANTS = (LORA, *MASKS, FULL)
Figures = dict[str, Any] | None  # of a variant on rows of one length; None of what does not fit


def made(variant: str, shape: dict[str, Any], device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A random model in bfloat16 that checkpoints activations, made ready for `variant`, and its optimizer."""
    model: PreTrainedModel = base_model(shape, False, device)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if variant in MASKS:
        fields, kind = MASKS[variant]
        masked = get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", seed=0, **fields)).train()
        optimizer = create_mask_optimizer(masked)
        if kind == "sign_in_backward":
            cast(SignAdamW, optimizer).step_in_backward()
        return masked, optimizer
    trained: nn.Module = model
    if variant == LORA:
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        trained = get_peft_model(model, config)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    return trained.train(), torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def step_of(model: Any, optimizer: torch.optim.Optimizer, tokens: int) -> Callable[[], None]:
    vocabulary, device = model.config.vocab_size, next(model.parameters()).device
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], rounds: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of each step by the clock, and on a GPU those between its events."""
    on_gpu = torch.device(device).type == "cuda"
    by_clock, by_events = [], []
    for _ in range(rounds):
        wait_for(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * on_gpu)]
        start = time.perf_counter()
        for event in events[:1]:
            event.record()
        step()
        for event in events[1:]:
            event.record()
        wait_for(device)
        by_clock.append(time.perf_counter() - start)
        if events:
            by_events.append(events[0].elapsed_time(events[1]) / 1e3)
    return by_clock, by_events


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int, rounds: int, device: str) -> Figures:
    step = step_of(model, optimizer, tokens)
    step()  # makes the optimizer's state
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_allocated(device)
    else:
        states = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
        held = bytes_of(model) + sum(t.nbytes for t in states)
    peak = held + peak_bytes(step, device)
    seconds, events = timed(step, rounds, device)
    return {"seconds": seconds, "event_seconds": events, "peak_bytes": peak}


def of_variant(
    variant: str, shape: dict[str, Any], lengths: Sequence[int], rounds: int, device: str
) -> dict[int, Figures]:
    """Figures by the length of rows; of what does not fit, and of all longer rows, None."""
    found: dict[int, Figures] = dict.fromkeys(sorted(lengths))
    try:
        model, optimizer = made(variant, shape, device)
        for tokens in found:
            found[tokens] = measured(model, optimizer, tokens, rounds, device)
    except torch.OutOfMemoryError as error:
        print(f"{variant}: {str(error).splitlines()[0]}", flush=True)
    return found


def estimated(variant: str, shape: dict[str, Any], tokens: int) -> int:
    if variant == FULL:
        return of_full(shape, tokens).total
    if variant == LORA:
        return of_lora(shape, "bfloat16", tokens).total
    return of_mask(shape, "bfloat16", *MASKS[variant], tokens).total


def row_of(name: str, tokens: int, variant: str, own: Figures, lora: Figures, estimate: int) -> tuple[str, ...]:
    expected = f"{estimate / 1e9:.1f}"
    if own is None:
        return (name, f"{tokens:,}", variant, "does not fit", "", "", "", "", expected)
    median = statistics.median(own["seconds"])
    events = f"{statistics.median(own['event_seconds']) * 1e3:.0f}" if own["event_seconds"] else ""
    ratio = f"{median / statistics.median(lora['seconds']):.2f}" if lora else ""
    peak = f"{own['peak_bytes'] / 1e9:.1f}"
    return (
        name,
        f"{tokens:,}",
        variant,
        f"{median * 1e3:.0f}",
        events,
        f"{tokens / median:,.0f}",
        ratio,
        peak,
        expected,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LLAMAS, default=["1B", "8B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384], help="of the rows, one a step")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    rows, figures = [], {}
    for name in args.models:
        shape, found = LLAMAS[name], {}
        for variant in args.variants:
            print(f"Llama {name}: {variant}", flush=True)
            found[variant] = of_variant(variant, shape, args.tokens, args.rounds, args.device)
            gc.collect()  # models refer to themselves
            if torch.device(args.device).type == "cuda":
                torch.cuda.empty_cache()
        for tokens in sorted(args.tokens):
            for variant in args.variants:
                own, lora = found[variant][tokens], found.get(LORA, {}).get(tokens)
                estimate = estimated(variant, shape, tokens)
                figures[f"{name}/{tokens}/{variant}"] = {**(own or {"fits": False}), "estimated_bytes": estimate}
                rows.append(row_of(f"Llama {name}", tokens, variant, own, lora, estimate))
        header = ("model", "tokens", "variant", "ms a step", "ms by CUDA events", "tokens a second", "x LoRA")
        body = (
            f"Random Llamas in bfloat16, a row a step, gradient checkpointing; {args.rounds} steps of each, medians, "
            f"one model after another. `mask` is the default, gradient_tokens={MaskConfig().gradient_tokens}. AdamW of "
            "LoRA and of full fine-tuning is fused, its moments have the dtype of the weights. Memory: the most that "
            "tensors held at one time in a step, model included, and what `benchmarks.cards` estimates.\n\n"
            + table((*header, "peak memory, GB", "estimated, GB"), rows)
        )
        report("llama-step", "A training step of large Llamas", body, figures, args.results, args.device)


if __name__ == "__main__":
    main()
