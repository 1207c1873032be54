"""Time and peak memory of a training step: masks, full fine-tuning, LoRA r=8, and masking as the official code does it.

python -m benchmarks.step [--rounds 15]
python -m benchmarks.step --checkpointing [--dtype bfloat16]    # the same with gradient checkpointing
python -m benchmarks.step --device cuda --dtype bfloat16        # larger batches; large models: llama_step
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from benchmarks import memory
from benchmarks.harness import in_turn, peak_bytes, report, table
from peft_mask import MaskConfig, SignAdamW, create_mask_optimizer, training_memory

# name -> (shape of the model, rows and word pieces of a batch)
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "MiniLM-L6": (
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        (32, 32),
    ),
    "BERT-base": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        (32, 32),
    ),
    # as SmolLM2-135M, with a third of its layers
    "small Llama": (
        {
            "hidden_size": 576,
            "num_hidden_layers": 10,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 32000,
            "pad_token_id": 0,
        },
        (8, 128),
    ),
}
# what a CPU is too slow for; models of which a GPU does not hold all variants at a time are those of `llama_step`
GPU_MODELS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "BERT-base, 64 x 128": (MODELS["BERT-base"][0], (64, 128)),
}
ALL_MODELS = MODELS | GPU_MODELS


class OfficialLinear(nn.Module):
    """Masking after the official code: a float mask and a masked weight made in autograd, both kept for backward."""

    def __init__(self, base: nn.Linear, threshold: float = 0.01) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.threshold = threshold
        self.scores = nn.Parameter(torch.full_like(base.weight, 2 * threshold))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = StraightThrough.apply(self.scores, self.threshold)
        return F.linear(x, mask * self.base.weight, self.base.bias)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def base_model(shape: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    if "num_key_value_heads" in shape:
        return LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=6))
    return BertForSequenceClassification(BertConfig(**shape, num_labels=6))


MASKS = {name: row for name, row in memory.MASKS.items() if row[1] != "adamw"} | {
    "mask, gradient_tokens=0.25": ({"gradient_tokens": 0.25}, "sign"),
    "mask, all weights, threshold, AdamW": ({"candidates": None, "binarizer": "threshold"}, "adamw"),
}


def mask_config(variant: str) -> MaskConfig:
    return MaskConfig(task_type="SEQ_CLS", **MASKS[variant][0])


def mask(variant: str) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda base: get_peft_model(base, mask_config(variant))


def lora(base: PreTrainedModel) -> nn.Module:
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear"))


def official(base: PreTrainedModel) -> nn.Module:
    model = base.requires_grad_(False)
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            model.base_model.set_submodule(name, OfficialLinear(module))
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            module.requires_grad_()
    return model


# name -> how a base model becomes what is trained
VARIANTS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "full fine-tuning": lambda base: base,
    **{name: mask(name) for name in MASKS},
    "LoRA r=8": lora,
    "official masking": official,
}


def checkpointed(model: nn.Module) -> nn.Module:
    """Let a model compute the activations of its blocks again in the backward pass."""
    anything: Any = model
    anything.gradient_checkpointing_enable()
    anything.enable_input_require_grads()
    return model


def make_step(variant: str, model: nn.Module, batch: tuple[int, int]) -> Callable[[], None]:
    """Return a function that does one optimizer step of a model made for `variant`, on fixed random rows."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    ids = torch.randint(1000, 20000, batch, generator=generator).to(device)
    labels = torch.randint(6, (batch[0],), generator=generator).to(device)
    optimizer = make_optimizer(variant, model.train())

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_optimizer(variant: str, model: nn.Module) -> torch.optim.Optimizer:
    if variant in MASKS:
        optimizer = create_mask_optimizer(model)
        if MASKS[variant][1] == "sign_in_backward":
            cast(SignAdamW, optimizer).step_in_backward()
        return optimizer
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def peak_of_training(variant: str, make: Callable[[str], nn.Module], batch: tuple[int, int], device: str) -> int:
    """Peak bytes of tensors from making the model to the end of its second step."""

    def run() -> None:
        step = make_step(variant, make(variant), batch)
        step()
        step()

    return peak_bytes(run, device)


def estimated_bytes(
    shape: dict[str, Any], batch: tuple[int, int], variant: str, dtype: torch.dtype, checkpointing: bool
) -> int | None:
    """What `training_memory` says of a mask before there is a model."""
    if variant not in MASKS:
        return None
    with torch.device("meta"):
        model = base_model(shape).to(dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = {"input_ids": torch.zeros(batch, dtype=torch.long), "labels": torch.zeros(batch[0], dtype=torch.long)}
    return training_memory(model, mask_config(variant), inputs, MASKS[variant][1]).total


def _in_mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=ALL_MODELS, metavar="MODEL", help=f"of {', '.join(ALL_MODELS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all variants")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype)
    on_cpu = torch.device(args.device).type == "cpu"
    rows, figures, batches = [], {}, []
    for name in args.models or (MODELS if on_cpu else GPU_MODELS):
        shape, batch = ALL_MODELS[name]
        batches.append(f"{name} {batch[0]} of {batch[1]}")

        def make(variant: str, shape: dict[str, Any] = shape) -> nn.Module:
            model = VARIANTS[variant](base_model(shape).to(args.device, dtype))
            return checkpointed(model) if args.checkpointing else model

        steps = {variant: make_step(variant, make(variant), batch) for variant in VARIANTS}
        clock = time.process_time if on_cpu else time.perf_counter
        times = in_turn(steps, args.rounds, warmup=2, clock=clock, device=args.device)
        del steps
        for variant in VARIANTS:
            ratio, to_lora = (times[variant].ratio(times[other]) for other in ("full fine-tuning", "LoRA r=8"))
            peak = peak_of_training(variant, make, batch, args.device)
            figures[f"{name}/{variant}"] = {"seconds": times[variant].seconds, "peak_bytes": peak}
            spread = f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
            estimate = estimated_bytes(shape, batch, variant, dtype, args.checkpointing)
            figures[f"{name}/{variant}"]["estimated_bytes"] = estimate
            times_lora = f"{to_lora[0]:.2f} ({to_lora[1]:.2f}-{to_lora[2]:.2f})"
            milliseconds = f"{times[variant].median * 1e3:.0f}"
            rows.append((name, variant, milliseconds, spread, times_lora, f"{peak / 1e6:.0f}", _in_mb(estimate)))
    header = (
        "model",
        "variant",
        "ms a step (median)",
        "x full fine-tuning (min-max)",
        "x LoRA r=8 (min-max)",
        "peak memory, MB",
        "`training_memory` says",
    )
    body = (
        f"{args.rounds} rounds, variants in turn. A step is forward, backward and the optimizer (AdamW, for "
        f"all but masks fused) on rows of word pieces ({', '.join(batches)}), in {args.dtype}, dropout as it comes"
        f"{', with gradient checkpointing' if args.checkpointing else ''}; of a CPU processor time, of all threads; "
        "ratios are round by round. Memory: the most that tensors held at one time "
        "from making the model to the end of the second step.\n\n" + table(header, rows)
    )
    parts = ["step", *(["bfloat16"] if on_cpu and dtype == torch.bfloat16 else [])]
    parts += ["checkpointed"] if args.checkpointing else []
    report("-".join(parts), "A training step: time and memory", body, figures, args.results, args.device)


if __name__ == "__main__":
    main()
