"""How much of its budget a mask spends: a share of it while it grows, all of it, or as many bytes as were promised."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

from torch import nn

from peft_mask.format.packing import count_zeros
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.mask_model import MaskModel
from peft_mask.model.scored import trained_scores
from peft_mask.scores.budget import budget_zeros


def budgets(model: nn.Module) -> list[tuple[MaskLayer, str, float]]:
    """Return the layers of adapters in training that have a budget, the adapter's name and the sparsity it aims at."""
    configs: dict[str, Any] = {}
    for module in model.modules():  # the adapted model may lie inside, as in a SentenceTransformer
        configs |= getattr(module, "peft_config", None) or {}
    return [
        (layer, adapter_name, configs[adapter_name].target_sparsity)
        for _, layer, adapter_name in trained_scores(model)
        if layer.has_budget(adapter_name)
    ]


def spend_budget(model: nn.Module, share: float) -> None:
    """Let adapters in training switch off a share of their budget for now; the budget itself stays what it is.

    `MaskCallback(schedule=...)` calls this before each step; a custom loop calls it with `SparsitySchedule.share`. The
    share holds until it is set anew, or another training begins: with `MaskCallback` or `create_mask_optimizer`.

    Args:
        model: a PEFT model, a transformers model with adapters, or one that contains it, with masks to train.
        share: from 0, one weight of each matrix, to 1, all of it. Adapters without a budget are left alone.

    Raises:
        ValueError: if the share is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1, got {share!r}.")
    for layer, adapter_name, sparsity in budgets(model):
        layer.set_sparsity(adapter_name, share * sparsity)


def end_spending(model: nn.Module) -> None:
    """End a training: masks stay what they are, and the next one, whoever runs it, has the whole budget.

    Args:
        model: as in `spend_budget`.
    """
    for layer, adapter_name, sparsity in budgets(model):
        if layer.zeros_at_rest(adapter_name) is None:
            let = _zeros_let(layer, adapter_name)
            layer.set_sparsity(adapter_name, sparsity)
            if let < _zeros_let(layer, adapter_name):
                layer.rest(adapter_name, let)


def _zeros_let(layer: MaskLayer, adapter_name: str) -> int:
    rule = layer.rule(adapter_name)
    return cast(int, rule.zeros) * math.prod(rule.unit)


def all_spent(model: nn.Module) -> bool:
    """Return whether no adapter in training is held to a part of its budget (see `end_spending`)."""
    return all(layer.zeros_at_rest(adapter_name) is None for layer, adapter_name, _ in budgets(model))


def spent_share(model: nn.Module) -> float:
    """Return the smallest share of their budget that adapters in training have to be let in order to lose no zero."""
    share = 0.0
    for layer, adapter_name, sparsity in budgets(model):
        rule, shape = layer.rule(adapter_name), layer.mask_shape
        zeros = count_zeros(layer.packed_mask(adapter_name), shape) // math.prod(rule.unit)
        if zeros > 1:  # one may be off at any share
            share = max(share, zeros / budget_zeros(rule.units(shape), sparsity))
    return min(share, 1.0)


def fill_budget(model: nn.Module) -> None:
    """Bring adapters in training that were given `target_bytes` to that size, as their masks are coded.

    `MaskCallback` calls this at the end of training; a custom loop calls it before saving.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MaskModel):
        return
    for adapter_name in {adapter for _, _, adapter in trained_scores(model)}:
        if (target_bytes := tuner.peft_config[adapter_name].target_bytes) is not None:
            try:
                tuner.set_target_bytes(target_bytes, adapter_name)
            except ValueError as error:  # a training is not lost for it
                sparsity = tuner.peft_config[adapter_name].target_sparsity
                warnings.warn(f"the adapter '{adapter_name}' keeps its sparsity of {sparsity:g}: {error}", stacklevel=2)
