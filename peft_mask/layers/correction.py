"""The sparse correction: what the weights that are off would have added to an output, for rows of several adapters.

With Z the weights that are off and zero elsewhere, `x (W * M)^T = x W^T - x Z^T`. The first product is one for the
whole batch, whoever its rows belong to; the second is as sparse as the mask and differs from adapter to adapter. So a
batch of many adapters costs one pass and a little for each.

The sum is another order of adding the same numbers, and not the bits of the masked product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WIDEST = 64  # tokens that are gathered together: so many values of all inputs stay in the processor's cache


class Zeros(NamedTuple):
    """The weights that one mask switches off, by output; outputs with equally many of them stand together.

    A loop of the same length many times over is what a processor foresees: twice as fast as in the order of outputs.

    Attributes:
        pointers: (out + 1,) int32, where the weights of each output begin, and where the last ones end.
        columns: (zeros,) int32, the input of each weight.
        values: (zeros,) tensor of the weight's dtype, what the base has there.
        places: (out,) int32, which of the sorted outputs is the first, the second, ...
    """

    pointers: Tensor
    columns: Tensor
    values: Tensor
    places: Tensor

    def to_dense(self, width: int) -> Tensor:
        """Return Z, an (out, width) tensor of the dtype of the values."""
        counts = self.pointers.diff().long()
        dense = self.values.new_zeros(len(counts), width)
        dense[torch.repeat_interleave(counts), self.columns.long()] = self.values
        return dense[self.places.long()]


def zeros_of(positions: Tensor, weight: Tensor, *, transposed: bool = False) -> Zeros:
    """Return the weights at row-major positions as `Zeros`.

    Args:
        positions: (zeros,) integer tensor, ascending and distinct.
        weight: (out, in) tensor, contiguous; (in, out) if `transposed`.
        transposed: whether `weight` is stored as in transformers' `Conv1D`.
    """
    positions = positions.long()
    rows, columns = positions // weight.shape[1], positions % weight.shape[1]
    if transposed:
        rows, columns = columns, rows
    counts = rows.new_zeros(weight.shape[1 if transposed else 0]).index_add_(0, rows, torch.ones_like(rows))
    by_count = counts.argsort(stable=True)
    places = by_count.argsort()
    order = places[rows].argsort(stable=True)
    return Zeros(
        pointers=torch.nn.functional.pad(counts[by_count].cumsum(0), (1, 0)).int(),
        columns=columns[order].int(),
        values=weight.detach().view(-1)[positions[order]],
        places=places.int(),
    )


def correct(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> Tensor:
    """Return `x Z^T`, with the Z of its own adapter for each token.

    Args:
        x: (tokens, in) tensor, those of one adapter together.
        sizes: how many tokens each of the adapters has; what is left behind them belongs to none.
        zeros: what each of the adapters switches off, at least one.

    Returns:
        (tokens, out) tensor of the dtype of `x`, zero for tokens of none; differentiable in `x`. Summed in float32 at
        least and rounded once.

    Source: the sum over an output's weights is what an embedding bag does with the rows of a table.
    """
    pointers, columns, values, places = zip(*zeros, strict=True)
    return torch.ops.peft_mask.correction(x, sizes, pointers, columns, values, places)  # type: ignore[no-any-return]


def correct_reference(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> Tensor:
    """The readable twin of `correct`: same shapes, same values, same gradient; makes each Z a matrix."""
    groups = x.split([*sizes, len(x) - sum(sizes)])
    outputs = [tokens @ own.to_dense(x.shape[1]).t() for tokens, own in zip(groups, zeros, strict=False)]
    return torch.cat([*outputs, x.new_zeros(len(groups[-1]), len(zeros[0].places))])


@torch.library.custom_op("peft_mask::correction", mutates_args=())
def _correction(
    x: Tensor,
    sizes: Sequence[int],
    pointers: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    places: Sequence[Tensor],
) -> Tensor:
    zeros = list(zip(pointers, columns, values, places, strict=True))
    if len(x) == len(sizes) and all(size == 1 for size in sizes):
        sums = [_bag(token.unsqueeze(1), *own).view(-1) for token, own in zip(x.unbind(), zeros, strict=True)]
        return torch.stack(sums)
    output = x.new_zeros(len(x), len(places[0]))
    start = 0
    for size, own in zip(sizes, zeros, strict=True):
        for begin in range(start, start + size, _WIDEST):
            tokens = slice(begin, min(begin + _WIDEST, start + size))
            output[tokens] = _bag(x[tokens].t().contiguous(), *own).t()
        start += size
    return output


def _bag(table: Tensor, pointers: Tensor, columns: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Return `Z table`, an (out, tokens) tensor, of an (in, tokens) table."""
    sums = torch.embedding_bag(table, columns, pointers, False, 0, False, values, True)[0]
    return sums.index_select(0, places)


@_correction.register_fake
def _(
    x: Tensor,
    sizes: Sequence[int],
    pointers: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    places: Sequence[Tensor],
) -> Tensor:
    return x.new_empty(len(x), len(places[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.sizes, pointers, columns, values, places = inputs
    ctx.save_for_backward(*pointers, *columns, *values, *places)
    ctx.width = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """`dL/dx = dL/dy Z`: the same weights, added from outputs to inputs."""
    count = len(ctx.sizes)
    saved = [ctx.saved_tensors[start : start + count] for start in range(0, 4 * count, count)]
    parts = []
    for tokens, *own in zip(grad.split([*ctx.sizes, len(grad) - sum(ctx.sizes)]), *saved, strict=False):
        zeros = Zeros(*own)
        into = tokens.t()[zeros.places.argsort()]  # dL/dy by sorted output
        added = into[torch.repeat_interleave(zeros.pointers.diff().long())] * zeros.values.unsqueeze(1)
        parts.append(tokens.new_zeros(ctx.width, len(tokens)).index_add_(0, zeros.columns, added).t())
    parts.append(grad.new_zeros(len(grad) - sum(ctx.sizes), ctx.width))
    nothing = [None] * count
    return torch.cat(parts), None, nothing, nothing, nothing, nothing


_correction.register_autograd(_backward, setup_context=_keep)
