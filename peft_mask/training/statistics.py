"""Figures of masks in training: how many weights are off, how many have changed, what a file would take."""

from __future__ import annotations

import warnings

from torch import nn

from peft_mask.format.checksums import checksum_of
from peft_mask.format.packing import count_zeros, entropy_bits
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.scored import trained_scores
from peft_mask.tensors.sharded import whole


class MaskStatistics:
    """Figures of the masks in training, counted from the scores against where they started.

    Where FSDP2 or ZeRO-3 keeps scores in parts, all processes make it together, and call `unmoved` together.

    Args:
        model: a model with masks to train; its masks now are what flips are counted against.

    Attributes:
        zeros_at_start: how many weights these switch off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = {}
        self._scores: dict[str, str] = {}  # their checksums
        self.zeros_at_start = 0
        for name, layer, adapter in trained_scores(model):
            self._start[name] = packed = layer.packed_mask(adapter)
            self._scores[name] = _checksum(name, layer, adapter)
            self.zeros_at_start += count_zeros(packed, layer.mask_shape)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of `model` now, over all masks in training.

        Returns:
            `sparsity`: fraction of weights off. `flip_ratio`: fraction of weights whose mask differs from the start.
            `bits_per_weight`: entropy of the masks, sum of `H(zeros / n) n` over the matrices divided by the weights:
            what their file takes, within a few per cent.
        """
        weights = zeros = flips = 0
        bits = 0.0
        for name, layer, adapter in trained_scores(model):
            packed, shape = layer.packed_mask(adapter), layer.mask_shape
            size, off = shape.numel(), count_zeros(packed, shape)
            weights += size
            zeros += off
            bits += entropy_bits(off, size)
            if name in self._start:
                flips += packed.numel() * 8 - count_zeros(packed ^ self._start[name], (packed.numel() * 8,))
        if not weights:
            return {}
        return {"sparsity": zeros / weights, "flip_ratio": flips / weights, "bits_per_weight": bits / weights}

    def unmoved(self, model: nn.Module) -> list[str]:
        """Return the adapters in training of which no score has changed since the start, by name.

        Example:
            >>> import torch
            >>> from peft import get_peft_model
            >>> from peft_mask import MaskConfig, MaskStatistics
            >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
            >>> statistics = MaskStatistics(model)
            >>> statistics.unmoved(model)
            ['default']
            >>> model.base_model.set_scores(lambda name, weight: weight)
            >>> statistics.unmoved(model)
            []
        """
        trained = list(trained_scores(model))
        # a list first: where scores are in parts, no process may leave out one that another asks for
        same = [self._scores.get(name) == _checksum(name, layer, adapter) for name, layer, adapter in trained]
        moved = {adapter for (*_, adapter), unchanged in zip(trained, same, strict=True) if not unchanged}
        return sorted({adapter for *_, adapter in trained} - moved)

    def warn_of_unmoved(self, model: nn.Module) -> None:
        """Warn of every adapter whose scores a training has left where they were: it has learned nothing.

        `MaskCallback` does so at the end of a training; a custom loop calls it after saving.
        """
        warn_of_unmoved(self.unmoved(model))


def warn_of_unmoved(adapters: list[str]) -> None:
    """Warn of adapters that a training has taught nothing (see `MaskStatistics.unmoved`)."""
    for adapter in adapters:
        warnings.warn(
            f"no score of the adapter '{adapter}' has moved, so its mask is the one that the training started from. "
            "Either no step had a gradient that is finite and not zero: look for a reward that is the same for all "
            "completions of a prompt (GRPO, RLOO), or a loss that does not depend on the masked layers. Or no step "
            "moved anything: look at the learning rate.",
            stacklevel=3,
        )


def _checksum(name: str, layer: MaskLayer, adapter_name: str) -> str:
    return checksum_of(name, whole(layer.peft_mask_scores[adapter_name]))
