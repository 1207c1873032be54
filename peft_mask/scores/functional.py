"""Masked operations as pure functions of (input, weight, scores), with straight-through gradients.

A weight that is off is written as +0.0 by `where`, never computed as `weight * 0`: that would be -0.0 for negative
weights and NaN for infinite ones, and merged and unmerged models would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft_mask.format.packing import pack_bits, unpack_bits
from peft_mask.scores.binarize import binarize_threshold, threshold_of
from peft_mask.scores.drawn_tokens import drawn_tokens
from peft_mask.scores.packed_positions import in_full
from peft_mask.tensors.elements import put, take, without


def apply_mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `weight` with +0.0 wherever `mask` is False.

    Args:
        weight: tensor of any shape and dtype.
        mask: boolean tensor, broadcastable to `weight`; True where the weight is kept.

    Returns:
        A new tensor of the shape and dtype of `weight`. Kept values are the same bits. Differentiable in `weight`.
    """
    return torch.where(mask, weight, 0)


def apply_scores(weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return `apply_mask(weight, binarize_threshold(scores))`, in one pass over memory instead of two.

    On a CPU, forming W * M is what a masked layer adds to a plain one; this takes a third of the time of the two
    operations it stands for.

    Args:
        weight: tensor of any shape and floating dtype.
        scores: tensor of the same shape. Where one is NaN, the result is not defined.

    Returns:
        A new tensor of the shape and dtype of `weight`.
    """
    if weight.dtype != scores.dtype:
        return apply_mask(weight, binarize_threshold(scores))
    # The gradient of torch's `threshold` is just this: its first argument where the second exceeds a number, else +0.0.
    return torch.ops.aten.threshold_backward(weight, scores, threshold_of(scores.dtype))


def per_weight(units: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return what is given for each block of a weight for each weight of it: a tensor of the weight's shape.

    Args:
        units: tensor of as many dimensions as `shape`, whose lengths divide those of `shape`.
        shape: shape of the weight.

    >>> per_weight(torch.tensor([[True], [False]]), (4, 2)).int().tolist()
    [[1, 1], [1, 1], [0, 0], [0, 0]]
    """
    for axis, length in enumerate(shape):
        if 1 < units.shape[axis] < length:
            units = units.repeat_interleave(length // units.shape[axis], axis)
    return units.expand(*shape)


def per_unit(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the sums of a tensor over the blocks of a weight, of which there are `shape`: the twin of `per_weight`."""
    sizes = [size for length, units in zip(values.shape, shape, strict=True) for size in (units, length // units)]
    blocks = values.reshape(sizes)
    return blocks.sum(tuple(range(1, blocks.dim(), 2)), dtype=torch.promote_types(values.dtype, torch.float32))


def _masked(
    weight: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    off: torch.Tensor | None,
) -> torch.Tensor:
    """`weight` under its scores: the threshold's mask, or the one given, of all blocks or of weights at `positions`."""
    if off is not None:
        return without(weight, off)
    if mask is None and positions is None and scores.shape == weight.shape:
        return apply_scores(weight, scores)
    if mask is None:
        mask = binarize_threshold(scores)
    if positions is None:
        return apply_mask(weight, per_weight(mask, weight.shape))
    index = in_full(positions, weight.numel()).long()
    masked = weight.clone(memory_format=torch.contiguous_format)
    put(masked, index, torch.where(mask, take(masked, index), 0))
    return masked


def _score_gradient(
    grad: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    """`dL/d(W * M) * W`, summed over each block, or of weights at `positions`; `grad` may be overwritten."""
    if positions is not None:
        positions = in_full(positions, weight.numel())
        grad, weight = take(grad, positions), take(weight, positions)
    elif scores.shape != weight.shape:
        return per_unit(grad.mul_(weight), scores.shape).to(scores.dtype)
    return grad.to(scores.dtype).mul_(weight)


def _to_bits(mask: torch.Tensor | None) -> torch.Tensor | None:
    """What of a mask is kept for the backward pass: an eighth of it."""
    return None if mask is None else pack_bits(mask.reshape(-1))


def _from_bits(bits: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    return None if bits is None else unpack_bits(bits, (shape.numel(),)).view(shape)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scores: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        off: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scores, _to_bits(mask), positions, off)
        return _masked(weight, scores, mask, positions, off)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scores, bits, positions, off = ctx.saved_tensors
        mask = _from_bits(bits, scores.shape)
        needs_weight, needs_scores, *_ = ctx.needs_input_grad
        grad_weight = _masked(grad, scores, mask, positions, off) if needs_weight else None
        grad_scores = _score_gradient(grad.clone(), weight, scores, positions) if needs_scores else None
        return grad_weight, grad_scores, None, None, None


def masked_weight(
    weight: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    off: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mask a weight by its scores: `W * M`, by default with `M = scores >= 0`.

    The gradient of the scores is the straight-through one, `dL/dscores = dL/d(W*M) * W`: the binarizer counts as the
    identity, also for weights that are off, so that they can come back.

    Args:
        weight: (...) tensor, usually frozen.
        scores: tensor of the same shape, or of one that divides it: each score then governs a block of the weight, and
            its gradient is the sum over that; or (candidates,) with `positions`.
        mask: bool tensor of the shape of `scores`, what another rule than the threshold made of them.
        positions: (candidates,) integer tensor, where in the row-major `weight` the scores belong, or that packed (see
            `pack_positions`); all other weights are kept.
        off: (n,) integer tensor in place of `mask`, where in the row-major `weight` it is off (see `elements.without`);
            only if each score governs one weight.

    Returns:
        Tensor of the shape and dtype of `weight`. If `weight` requires a gradient, its off entries get zero.

    Source: Zhao et al. 2020, section 3; the estimator is Piggyback's (Mallya et al. 2018).
    """
    return _MaskedWeight.apply(weight, scores, mask, positions, off)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        off: torch.Tensor | None,
        transposed: bool,
        tokens: float,
        again: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight if again is None else None, scores, _to_bits(mask), positions, off)
        ctx.transposed, ctx.tokens, ctx.again = transposed, tokens, again
        masked = _masked(weight, scores, mask, positions, off)
        output = F.linear(x, masked.t() if transposed else masked, bias)
        # a view of two dimensions as it is, which autograd would not let anyone change in place after a function
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scores, bits, positions, off = ctx.saved_tensors
        weight = weight if ctx.again is None else ctx.again()
        mask = _from_bits(bits, scores.shape)
        needs_x, needs_weight, needs_scores, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_scores = grad_bias = None
        if needs_x:
            # Under autocast the product ran in the dtype of `grad`, and so does its backward.
            masked = _masked(weight, scores, mask, positions, off).to(grad.dtype)
            grad_x = (grad @ (masked.t() if ctx.transposed else masked)).to(x.dtype)
            del masked  # of the weight's size, as is what comes next
        if needs_scores or needs_weight:
            voting, columns = rows, x.reshape(-1, x.shape[-1])
            if ctx.tokens < 1 and not needs_weight:
                voting, columns = drawn_tokens(rows, columns, ctx.tokens)
            columns = columns.to(grad.dtype)
            product = columns.t() @ voting if ctx.transposed else voting.t() @ columns
            if needs_weight:
                grad_weight = _masked(product, scores, mask, positions, off).to(weight.dtype)
            if needs_scores:
                grad_scores = _score_gradient(product, weight, scores, positions)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_scores, grad_bias, None, None, None, None, None, None


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    off: torch.Tensor | None = None,
    *,
    transposed: bool = False,
    tokens: float = 1.0,
    again: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Apply a linear layer with a masked weight: `y = x (W * M)^T + b`, by default with `M = scores >= 0`.

    Equal to `masked_linear_reference` in value and gradients, but nothing of the weight's size is kept for the backward
    pass: `x`, `weight` and `scores` are saved by reference, the mask in bits or as `off`, and `W * M` is formed again.
    With `positions` only the scores' gradient is ever stored; `(dL/dy)^T x` lives as long as this layer's backward.

        dL/dx      = dL/dy (W * M)
        dL/dscores = (dL/dy)^T x * W          (straight-through: also where the weight is off)
        dL/dW      = (dL/dy)^T x * M          (only if `weight` requires a gradient)

    Args:
        x: (..., in) tensor.
        weight: (out, in) tensor, any strides; (in, out) if `transposed`.
        scores: tensor of the shape of `weight`, or of one that divides it (see `masked_weight`), or (candidates,) with
            `positions`; any floating dtype.
        bias: (out,) tensor or None.
        mask: bool tensor of the shape of `scores`, what another rule than the threshold made of them.
        positions: (candidates,) integer tensor, where in the row-major `weight` the scores belong, or that packed (see
            `pack_positions`); all other weights are kept.
        off: (n,) integer tensor in place of `mask` (see `masked_weight`).
        transposed: whether `weight` is stored as in transformers' `Conv1D`.
        tokens: fraction of the tokens, at most 1, whose terms make up the gradient of the scores (see
            `drawn_tokens`); where only its sign is used, fewer will do.
        again: makes `weight` again in the backward pass, for which it is then not kept.

    Returns:
        (..., out) tensor. Autocast applies to it as to `torch.nn.functional.linear`.

    Raises:
        RuntimeError: on a second differentiation, which the straight-through estimator does not define.

    Source: Zhao et al. 2020, section 3.
    """
    return _MaskedLinear.apply(x, weight, scores, bias, mask, positions, off, transposed, tokens, again)


def masked_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    off: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """The readable twin of `masked_linear`: same shapes, same values, same gradients; keeps `W * M` for backward."""
    masked = masked_weight(weight, scores, mask, positions, off)
    return F.linear(x, masked.t() if transposed else masked, bias)
