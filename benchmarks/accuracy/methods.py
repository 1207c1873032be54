"""The methods: a table of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from torch.optim import Optimizer

from benchmarks.accuracy.optimizers import HEAD_LR, HEAD_NOTE, adamw
from benchmarks.accuracy.probe import Probe
from benchmarks.accuracy.rivals import RIVALS
from benchmarks.accuracy.sizes import in_head
from benchmarks.accuracy.training import Method
from peft_mask import MaskConfig, SparsitySchedule, create_mask_optimizer, spend_budget

STEPS_NOTE = "sign steps that shrink with the gradient"
GROWING_NOTE = "MaskConfig(), the budget grows over the first fifth, as with MaskCallback()"


def mask_adamw(model: nn.Module, lr: float) -> Optimizer:
    """What `create_mask_optimizer` makes by default, with the head at `HEAD_LR`."""
    return create_mask_optimizer(model, lr=HEAD_LR, mask_lr=lr)


def full(model: nn.Module, task_type: str) -> nn.Module:
    return model


def mask(**fields: Any) -> Callable[[nn.Module, str], nn.Module]:
    def build(model: nn.Module, task_type: str) -> nn.Module:
        return get_peft_model(model, MaskConfig(task_type=task_type, **fields))

    return build


def grow(model: nn.Module, progress: float) -> None:
    """Let the budget of a mask grow as `MaskCallback` does in 100 and more steps."""
    spend_budget(model, SparsitySchedule("linear", end=0.2).share(progress))


def smaller_mask(sparsity: float) -> Method:
    note = f"target_sparsity={sparsity}, {STEPS_NOTE}; {HEAD_NOTE}"
    return Method(f"mask-{sparsity}", note, mask(target_sparsity=sparsity), mask_adamw, (5e-4,))


def growing_mask(sparsity: float) -> Method:
    note = f"target_sparsity={sparsity}, the budget grows over the first fifth, {STEPS_NOTE}; {HEAD_NOTE}"
    return Method(f"growing-mask-{sparsity}", note, mask(target_sparsity=sparsity), mask_adamw, (5e-4,), grow)


def lora(r: int) -> Callable[[nn.Module, str], nn.Module]:
    def build(model: nn.Module, task_type: str) -> nn.Module:
        # PEFT leaves the head out of "all-linear" for sequence classification alone; here it stays out for tagging too.
        config = LoraConfig(
            task_type=task_type, r=r, lora_alpha=2 * r, target_modules="all-linear", exclude_modules=["classifier"]
        )
        return get_peft_model(model, config)

    return build


def lora_row(r: int) -> Method:
    note = f"all-linear, alpha {2 * r}, dropout 0; {HEAD_NOTE}"
    return Method(f"lora-r{r}", note, lora(r), adamw, (1e-3, 3e-3, 1e-2))


def bitfit(model: nn.Module, task_type: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or in_head(name))
    return model


def ia3(model: nn.Module, task_type: str) -> nn.Module:
    return get_peft_model(model, IA3Config(task_type=task_type))


def shira(model: nn.Module, task_type: str) -> nn.Module:
    # Without a seed PEFT draws the same positions in every run.
    return get_peft_model(model, ShiraConfig(task_type=task_type, r=1, random_seed=torch.initial_seed()))


RANKS, BITS = (16, 8, 4), (4, 2, 1)  # of LoRA that is quantised after training, see benchmarks.accuracy.quantized


def quantized_name(rank: int, bits: int) -> str:
    return f"lora-r{rank}-{bits}bit"


QUANTIZED = [quantized_name(rank, bits) for rank in RANKS for bits in BITS]
METHODS: dict[str, Method | Probe] = {
    method.name: method
    for method in (
        # one rate, any rate: with a budget only the order of the scores matters
        Method("mask", f"MaskConfig(), {STEPS_NOTE}; {HEAD_NOTE}", mask(), mask_adamw, (5e-4,)),
        Method("growing-mask", f"{GROWING_NOTE}, {STEPS_NOTE}; {HEAD_NOTE}", mask(), mask_adamw, (5e-4,), grow),
        Method(
            "part-mask",
            f"{GROWING_NOTE}, gradient_tokens=0.4, {STEPS_NOTE}; {HEAD_NOTE}",
            mask(gradient_tokens=0.4),
            mask_adamw,
            (5e-4,),
            grow,
        ),
        *map(smaller_mask, (0.0017, 0.0007)),
        *map(growing_mask, (0.02, 0.01, 0.002, 0.001, 0.0005, 0.0002)),
        Method("full", f"every parameter; {HEAD_NOTE}", full, adamw, (1e-4, 3e-4, 1e-3)),
        *map(lora_row, (16, 8, 4, 2, 1)),
        Method("bitfit", f"every bias, LayerNorm's too; {HEAD_NOTE}", bitfit, adamw, (1e-3, 3e-3, 1e-2)),
        Method("ia3", f"IA3Config(): key, value and both output.dense; {HEAD_NOTE}", ia3, adamw, (3e-3, 1e-2, 3e-2)),
        Method(
            "shira-r1",
            f"ShiraConfig(r=1), the smallest it offers: query and value, random positions, saved as int32; {HEAD_NOTE}",
            shira,
            adamw,
            (1e-2, 3e-2, 1e-1, 3e-1),
        ),
        *RIVALS,
        Probe(),
    )
}
