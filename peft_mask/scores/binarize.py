"""Scores -> mask: the rules that decide which weights are kept.

Scores are stored relative to the threshold, so every rule compares with zero. Around zero bfloat16 resolves far smaller
steps than around a threshold such as 0.01, where its spacing (6e-5) is a whole optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft_mask.scores.order import lowest, lowest_among
from peft_mask.tensors.noise import uniform_like

# The largest negative number of a dtype that no processor setting turns into zero. Where subnormal numbers are flushed,
# a score among them counts as zero; taking them all for zero makes the mask the same everywhere. For float16, whose
# subnormal numbers are computed with as float32, it is the largest negative number there is.
_JUST_BELOW_ZERO = {torch.float16: -(2.0**-24)}

_FEW = 16  # members of a group, for which counting takes no longer than sorting


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


def binarize_topk(scores: torch.Tensor, zeros: int | torch.Tensor, most: int = 0) -> torch.Tensor:
    """Switch off the `zeros` weights of lowest score, if it is below the threshold: `mask = rank(scores) >= zeros`.

    The mask depends on the order of the scores alone: multiplying them all by a positive number, as another learning
    rate does to scores that start at zero, changes nothing.

    Args:
        scores: real-valued tensor of any shape and floating dtype.
        zeros: how many weights are off, at most; fewer are if fewer scores are below zero. In a tensor without
            dimensions, on the device of the scores, `torch.compile` compiles for all numbers up to `most` at once.
        most: what such a tensor may hold at most.

    Returns:
        Boolean tensor of the same shape, True where the weight is kept. The count is exact, also with tied scores: of
        these the first in row-major order go. NaN scores are kept.

    Source: the ranking of movement pruning (Sanh et al. 2020), here with a budget of what is removed.

    >>> binarize_topk(torch.tensor([-1.0, 2.0, -3.0, -1.0]), 2)
    tensor([False,  True, False,  True])
    """
    below = threshold_of(scores.dtype)
    if isinstance(zeros, torch.Tensor):
        return ~lowest_among(scores, zeros, most, below)
    return ~lowest(scores, zeros, below)


def binarize_groups(scores: torch.Tensor, kept: int, size: int, dimension: int = -1) -> torch.Tensor:
    """Keep the `kept` weights of highest score among each `size` consecutive ones: an N:M mask, such as 2:4.

    Args:
        scores: real-valued tensor of any floating dtype.
        kept: N, how many of a group are kept, whatever their scores.
        size: M, how many make a group; it divides the length of `dimension`.
        dimension: along which the groups lie, the inputs of a layer for hardware to make use of them.

    Returns:
        Boolean tensor of the shape of `scores`, True where the weight is kept. Of tied scores the first are kept.

    Source: the official code has none; N:M masks are learned by MaskLLM (Fang et al. 2024), among others.

    >>> binarize_groups(torch.tensor([[4.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]]), kept=2, size=4).int()
    tensor([[1, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """
    groups = scores.movedim(dimension, -1).unflatten(-1, (-1, size))
    mask = _highest_by_counting(groups, kept) if size <= _FEW else _highest_by_sorting(groups, kept)
    return mask.flatten(-2).movedim(-1, dimension)


def _highest_by_counting(groups: torch.Tensor, kept: int) -> torch.Tensor:
    """Mark those with fewer than `kept` before them: of small groups several times as fast as sorting."""
    members = groups.unbind(-1)
    marks = []
    for i, own in enumerate(members):
        before = torch.zeros_like(own, dtype=torch.int32)
        for j, other in enumerate(members):
            if j != i:
                before += (other >= own) if j < i else (other > own)
        marks.append(before < kept)
    return torch.stack(marks, -1)


def _highest_by_sorting(groups: torch.Tensor, kept: int) -> torch.Tensor:
    highest = groups.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, highest, True)


def binarize_bernoulli(scores: torch.Tensor, key: int) -> torch.Tensor:
    """Draw a mask: a weight is kept with the probability `sigmoid(score)`.

    Args:
        scores: real-valued tensor of any shape and floating dtype.
        key: what tells apart tensors of equal scores, from 0 to 2^32 - 1 (see `noise.uniform_like`).

    Returns:
        Boolean tensor of the same shape, the same for the same scores and key. NaN scores are off.

    Source: official code, `MaskedLinear3`. It draws in evaluation, too, where we keep what is likelier kept than not:
    `binarize_threshold`.
    """
    return uniform_like(scores, key) < scores.detach().float().sigmoid()


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scores)
        return scores.view_as(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (scores,) = ctx.saved_tensors
        outward = (scores >= 1) & (grad < 0) | (scores <= -1) & (grad > 0)
        return grad.masked_fill(outward, 0)


def bounded(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores as they are, and keep gradients from pushing them out of [-1, 1].

    A score at a bound, or beyond, gets no gradient that leads further out, and every one that leads back. So training
    keeps scores where they were clamped to, whatever the optimizer, up to what its momentum still adds.

    Args:
        scores: real-valued tensor of any shape and floating dtype.

    Source: official code, `MaskedLinear2`. It clamps the parameter in the forward pass and lets no gradient at all pass
    at a bound, from where no score comes back.
    """
    return _Bounded.apply(scores)
