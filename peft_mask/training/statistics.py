"""Figures of masks in training: how many weights are off, how many have changed, what a file would take."""

from __future__ import annotations

from torch import nn

from peft_mask.format.packing import count_zeros, entropy_bits
from peft_mask.model.scored import trained_scores


class MaskStatistics:
    """Figures of the masks in training, counted from the scores against where they started.

    Args:
        model: a model with masks to train; its masks now are what flips are counted against.

    Attributes:
        zeros_at_start: how many weights these switch off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = {}
        self.zeros_at_start = 0
        for name, layer, adapter in trained_scores(model):
            self._start[name] = packed = layer.packed_mask(adapter)
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
