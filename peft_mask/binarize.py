"""Scores -> mask: the rules that decide which weights are kept.

Scores are stored relative to the threshold, so every rule compares with zero. Around zero bfloat16 resolves far smaller
steps than around a threshold such as 0.01, where its spacing (6e-5) is a whole optimizer step.
"""

from __future__ import annotations

import torch

from peft_mask.packing import index_dtype

# The largest negative number of a dtype that no processor setting turns into zero. Where subnormal numbers are flushed,
# a score among them counts as zero; taking them all for zero makes the mask the same everywhere. For float16, whose
# subnormal numbers are computed with as float32, it is the largest negative number there is.
_JUST_BELOW_ZERO = {torch.float16: -(2.0**-24)}


def threshold_of(dtype: torch.dtype) -> float:
    """Return the number that a score of this dtype must exceed to be kept: zero, but for rounding."""
    return _JUST_BELOW_ZERO.get(dtype, -torch.finfo(dtype).smallest_normal)


def binarize_threshold(scores: torch.Tensor) -> torch.Tensor:
    """Keep every weight whose score has reached the threshold: `mask = scores >= 0`.

    Args:
        scores: real-valued tensor of any shape and floating dtype, relative to the threshold (a score `s` of the paper
            with threshold `tau` is stored as `s - tau`).

    Returns:
        Boolean tensor of the same shape, True where the weight is kept. A score exactly at the threshold is kept, as in
        the paper's `>=`, and so is a negative subnormal one, which counts as zero. A NaN score compares False: callers
        that store or merge a mask refuse NaN beforehand.

    Source: Zhao et al. 2020, "Masking as an Efficient Alternative to Finetuning", equation 1. (The official code uses
    `>`; with continuous scores the difference has probability zero.)
    """
    return scores > threshold_of(scores.dtype)


def binarize_topk(scores: torch.Tensor, zeros: int) -> torch.Tensor:
    """Switch off the `zeros` weights of lowest score, if it is below the threshold: `mask = rank(scores) >= zeros`.

    The mask depends on the order of the scores alone: multiplying them all by a positive number, as another learning
    rate does to scores that start at zero, changes nothing.

    Args:
        scores: real-valued tensor of any shape and floating dtype.
        zeros: how many weights are off, at most; fewer are if fewer scores are below zero.

    Returns:
        Boolean tensor of the same shape, True where the weight is kept. The count is exact, also with tied scores: of
        these the first in row-major order go. NaN scores are kept.

    Source: the ranking of movement pruning (Sanh et al. 2020), here with a budget of what is removed.

    >>> binarize_topk(torch.tensor([-1.0, 2.0, -3.0, -1.0]), 2)
    tensor([False,  True, False,  True])
    """
    return ~lowest(scores, zeros, below=threshold_of(scores.dtype))


def lowest(values: torch.Tensor, count: int, below: float = torch.inf) -> torch.Tensor:
    """Mark the `count` lowest values among those that are at most `below`: bool, of the shape of `values`.

    Ties go to the first in row-major order, so that the result is the same on every device. No tensor is read back, so
    that nothing waits for a device and `torch.compile` sees one graph.
    """
    flat = values.reshape(-1)
    count = min(count, flat.numel())
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = flat.topk(count, largest=False, sorted=False).values.nan_to_num(torch.inf).amax().clamp(max=below)
    under, at = flat < limit, flat == limit
    rank = at.cumsum(0, dtype=index_dtype(flat.numel()))
    return (under | (at & (rank <= count - under.sum()))).view(values.shape)
