"""Time and peak memory of a training step: mask, full fine-tuning, LoRA r=8, and masking as the official code does it.

python -m benchmarks.step [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness import in_turn, peak_bytes, report, table
from peft_mask import MaskConfig, create_mask_optimizer

# name -> (shape of the model, rows and word pieces of a batch)
MODELS: dict[str, tuple[dict[str, int], tuple[int, int]]] = {
    "MiniLM-L6": (
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        (32, 32),
    ),
    "BERT-base": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        (32, 32),
    ),
}


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


def base_model(shape: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**shape, num_labels=6))


def mask(shape: dict[str, int]) -> nn.Module:
    return get_peft_model(base_model(shape), MaskConfig(task_type="SEQ_CLS"))


def full(shape: dict[str, int]) -> nn.Module:
    return base_model(shape)


def lora(shape: dict[str, int]) -> nn.Module:
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(base_model(shape), config)


def official(shape: dict[str, int]) -> nn.Module:
    model = base_model(shape).requires_grad_(False)
    for name, module in list(model.bert.named_modules()):
        if isinstance(module, nn.Linear):
            model.bert.set_submodule(name, OfficialLinear(module))
    model.classifier.requires_grad_()
    return model


Build = Callable[[dict[str, int]], nn.Module]
VARIANTS: dict[str, Build] = {
    "full fine-tuning": full,
    "mask": mask,
    "LoRA r=8": lora,
    "official masking": official,
}


def make_step(model: nn.Module, batch: tuple[int, int]) -> Callable[[], None]:
    """Return a function that does one optimizer step on fixed random rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, batch, generator=generator)
    labels = torch.randint(6, (batch[0],), generator=generator)
    optimizer = make_optimizer(model.train())

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if any("peft_mask_scores" in name for name, _ in model.named_parameters()):
        return create_mask_optimizer(model, fused=True)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def peak_of_training(build: Build, shape: dict[str, int], batch: tuple[int, int]) -> int:
    """Peak bytes of tensors from making the model to the end of its second step."""

    def run() -> None:
        step = make_step(build(shape), batch)
        step()
        step()

    return peak_bytes(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    rows, figures = [], {}
    for name in args.models:
        shape, batch = MODELS[name]
        steps = {variant: make_step(build(shape), batch) for variant, build in VARIANTS.items()}
        times = in_turn(steps, args.rounds, warmup=2)
        del steps
        for variant, build in VARIANTS.items():
            ratio = times[variant].ratio(times["full fine-tuning"])
            peak = peak_of_training(build, shape, batch)
            figures[f"{name}/{variant}"] = {"seconds": times[variant].seconds, "peak_bytes": peak}
            spread = f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
            rows.append((name, variant, f"{times[variant].median * 1e3:.0f}", spread, f"{peak / 1e6:.0f}"))
    header = ("model", "variant", "ms a step (median)", "x full fine-tuning (min-max)", "peak memory, MB")
    body = (
        f"{args.rounds} rounds, variants in turn. A step is forward, backward and AdamW (fused) on 32 rows of 32 word "
        "pieces in float32, dropout 0.1; ratios are round by round. Memory: the most that tensors held at one time "
        "from making the model to the end of the second step.\n\n" + table(header, rows)
    )
    report("step", "A training step: time and memory", body, figures)


if __name__ == "__main__":
    main()
