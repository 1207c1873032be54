"""Masks of many layers found at once, where one launch for each would take longer than what it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_mask.layers.scored_layer import ScoredLayer
from peft_mask.scores.off import off_positions_of_all
from peft_mask.tensors.sharded import has_no_storage, is_whole

_MOST = 2**20  # scores at a time: of more, launches take no longer than what they compute


@contextmanager
def found_ahead(model: nn.Module) -> Iterator[None]:
    """Find where the masks in training are off, for all layers of a forward pass that runs in this context.

    Layers that are alike are taken together: the same number of weights, of candidates and of zeros. On a CPU, where
    nothing is launched, each layer finds its own, and so do layers whose scores are in parts until they are used.
    """
    found = _alike(model)
    try:
        for (*_, numel, count, zeros), members in found.items():
            at_a_time = max(1, _MOST // count)
            for start in range(0, len(members), at_a_time):
                _find_alike(members[start : start + at_a_time], numel, zeros)
        yield
    finally:
        for members in found.values():
            for layer, _ in members:
                layer.found.end_ahead()


def _alike(model: nn.Module) -> dict[tuple[Any, ...], list[tuple[ScoredLayer, str]]]:
    """Return the layers and adapters whose masks are found together, by what they have in common."""
    first = next(model.parameters(), None)
    if torch.compiler.is_compiling() or first is None or first.device.type in ("cpu", "meta"):
        return {}
    alike: dict[tuple[Any, ...], list[tuple[ScoredLayer, str]]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, ScoredLayer) and not layer.merged and not layer.disable_adapters:
            for adapter_name in layer.active_adapters:
                if adapter_name in layer.peft_mask_scores and (kind := _kind(layer, adapter_name)) is not None:
                    alike[kind].append((layer, adapter_name))
    return alike


def _kind(layer: ScoredLayer, adapter_name: str) -> tuple[Any, ...] | None:
    """Return what layers must have in common to be taken together; None: this one finds its own."""
    scores, zeros = layer.peft_mask_scores[adapter_name], layer.zeros_in_force(adapter_name)
    if not zeros or not layer.looks_for_zeros:
        return None
    if scores.device.type == "cpu" or not is_whole(scores) or has_no_storage(scores):
        return None
    with_positions = adapter_name in layer.peft_mask_positions
    return scores.device, scores.dtype, with_positions, layer.mask_shape.numel(), scores.numel(), zeros


@torch.no_grad()
def _find_alike(members: Sequence[tuple[ScoredLayer, str]], numel: int, zeros: int) -> None:
    scores = [layer.peft_mask_scores[adapter_name] for layer, adapter_name in members]
    positions = [layer.positions(adapter_name) for layer, adapter_name in members]
    for (layer, adapter_name), off in zip(members, off_positions_of_all(scores, positions, numel, zeros), strict=True):
        layer.found.ahead(adapter_name, off)
