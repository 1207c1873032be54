"""The sparse correction: what the weights that are off would have added to an output, for rows of several adapters.

With Z the weights that are off and zero elsewhere, `x (W * M)^T = x W^T - x Z^T`. The first product is one for the
whole batch, whoever its rows belong to; the second is as sparse as the mask and differs from adapter to adapter. So a
batch of many adapters costs one pass and a little for each.

The sum is another order of adding the same numbers, and not the bits of the masked product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

_NARROW = 1 << 15  # places that an int16 tells apart
_WIDEST = 64  # tokens that are gathered at once for one adapter: their values stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Zeros:
    """The weights that one mask switches off, by output; outputs with equally many of them stand together.

    A loop of the same length many times over is what a processor foresees: twice as fast as in the order of outputs.

    Attributes:
        pointers: (out + 1,) int32, where the weights of each output begin, and where the last ones end.
        columns: (zeros,) int32, the input of each weight; on a CPU int16 where that is enough, which takes longer to
            read elsewhere.
        values: (zeros,) tensor of the weight's dtype, what the base has there.
        places: (out,) of the same kind, which of the sorted outputs is the first, the second, ...
    """

    pointers: Tensor
    columns: Tensor
    values: Tensor
    places: Tensor

    @cached_property
    def _views(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        return self.pointers.numpy(), self.values.numpy() if self.values.dtype.itemsize > 2 else None

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the first three on a CPU, as scipy wants to have them; kept so, they would take twice the memory."""
        pointers, values = self._views
        return pointers, self.columns.int().numpy(), self.values.float().numpy() if values is None else values

    def positions(self, width: int, *, transposed: bool = False) -> Tensor:
        """Return where the weights are in a matrix of so many columns: row-major, int64, in no order.

        Args:
            width: number of columns.
            transposed: whether the matrix is stored as in transformers' `Conv1D`.
        """
        sorted_outputs = self.places.argsort()  # which output is the first of the sorted ones, the second, ...
        outputs, inputs = sorted_outputs[torch.repeat_interleave(self.pointers.diff())], self.columns.long()
        return inputs * width + outputs if transposed else outputs * width + inputs

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
    rows = torch.div(positions, weight.shape[1], rounding_mode="floor")
    columns = positions - rows * weight.shape[1]
    if transposed:
        rows, columns = columns, rows
    counts = _counts(rows, weight.shape[1 if transposed else 0])
    by_count = counts.argsort(stable=True)
    places = torch.empty_like(by_count)
    places[by_count] = torch.arange(len(by_count), device=by_count.device)
    pointers = torch.nn.functional.pad(counts[by_count].cumsum(0), (1, 0))
    if transposed:
        order = places[rows].argsort(stable=True)
    else:  # those of an output stand together already, and move together
        moved = (counts.cumsum(0) - counts)[by_count] - pointers[:-1]
        order = torch.arange(len(rows), device=rows.device) + moved.repeat_interleave(
            counts[by_count], output_size=len(rows)
        )
    return Zeros(
        pointers=pointers.int(),
        columns=columns.to(_index_dtype(weight, transposed)).index_select(0, order),
        values=weight.detach().view(-1).index_select(0, positions).index_select(0, order),  # in the order of memory
        places=places.to(_index_dtype(weight, not transposed)),
    )


def _counts(rows: Tensor, length: int) -> Tensor:
    """Return how often each number below `length` is among `rows`; a device is not waited for."""
    if rows.device.type == "cpu":
        return torch.bincount(rows, minlength=length)
    return rows.new_zeros(length).index_add_(0, rows, torch.ones_like(rows))


def _index_dtype(weight: Tensor, first: bool) -> torch.dtype:
    """Return in what to keep places along a dimension of a weight, the first one or the last."""
    narrow = weight.device.type == "cpu" and weight.shape[0 if first else 1] <= _NARROW
    return torch.int16 if narrow else torch.int32


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
    if not (torch.is_grad_enabled() and x.requires_grad) and type(x) is Tensor and x.device.type not in _asked_for:
        return _computed(x, sizes, zeros)  # what the operator would do, which takes all these tensors apart first
    lists = ([getattr(own, field.name) for own in zeros] for field in fields(Zeros))
    return cast(Tensor, torch.ops.peft_mask.correction(x, sizes, *lists))


def corrected_product(
    x: Tensor,
    sizes: Sequence[int],
    zeros: Sequence[Zeros],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return `x (W * M)^T + b`, with the mask of its own adapter for each token, and none for those behind them.

    The product is added to the correction, not the correction to it, so that an output of 16 bits is rounded once.

    Args:
        x: (tokens, in) tensor, those of one adapter together.
        sizes: how many tokens each of the adapters has.
        zeros: what each of them switches off, at least one.
        weight: (out, in) tensor, W; (in, out) if `transposed`.
        bias: (out,) tensor, or (tokens, out), of the dtype of `weight`; None for none.
        transposed: whether `weight` is stored as in transformers' `Conv1D`.

    Returns:
        (tokens, out) tensor of the dtype of `weight`.
    """
    less = correct(x.to(weight.dtype), sizes, zeros)
    if bias is not None:
        less = less - bias
    return torch.addmm(less, x, weight if transposed else weight.t(), beta=-1)


def correct_reference(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> Tensor:
    """The readable twin of `correct`: same shapes, same values, same gradient; makes each Z a matrix."""
    groups = x.split([*sizes, len(x) - sum(sizes)])
    outputs = [tokens @ own.to_dense(x.shape[1]).t() for tokens, own in zip(groups, zeros, strict=False)]
    return torch.cat([*outputs, x.new_zeros(len(groups[-1]), len(zeros[0].places))])


def use_triton(active: bool = True) -> None:
    """Say whether few tokens of each adapter in a batch are corrected by a Triton kernel on CUDA devices.

    It is one launch for all adapters, where PyTorch's embedding bags are several for each. By default bags compute: the
    kernel was compiled for GPUs and run by Triton's interpreter, and never on a GPU. Its results are those of the bags
    to rounding, in float16, bfloat16, float32 and float64. Bags compute all the same what a CUDA graph captures, and
    gradients have a way of their own.

    Args:
        active: whether it is to be used. Holds for the process, for calls from now on; other devices know no kernel.

    Raises:
        ImportError: if triton cannot be imported; the CUDA builds of PyTorch for Linux bring it along.
    """
    if not active:
        _asked_for.pop("cuda", None)
        return
    try:
        from peft_mask.layers import correction_triton
    except ImportError as error:
        raise ImportError(
            f"use_triton() needs the package triton, which cannot be imported here: {error}. Install the version that "
            "your PyTorch asks for (pip install triton), or leave the correction to PyTorch, as it is by default."
        ) from error
    _asked_for["cuda"] = correction_triton.correction


_asked_for: dict[str, Callable[..., Tensor]] = {}  # type of device -> what computes the operator there

torch.library.define(
    "peft_mask::correction",
    "(Tensor x, SymInt[] sizes, Tensor[] pointers, Tensor[] columns, Tensor[] values, Tensor[] places) -> Tensor",
)


def _correction(
    x: Tensor,
    sizes: Sequence[int],
    pointers: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    places: Sequence[Tensor],
) -> Tensor:
    return _computed(x, sizes, [Zeros(*own) for own in zip(pointers, columns, values, places, strict=True)])


def _computed(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> Tensor:
    parts, start = [], 0
    for size, run in groupby(zip(sizes, zeros, strict=True), key=itemgetter(0)):
        own = [each for _, each in run]
        tokens = x[start : start + size * len(own)]
        start += len(tokens)
        if size == 1:
            parts.append(_of_one_token_each(tokens, own))
            continue
        for group, each in zip(tokens.split(size) if size else [tokens] * len(own), own, strict=True):
            parts += [_of_one_adapter(chunk, each) for chunk in group.split(_WIDEST)]
    if start < len(x):
        parts.append(x.new_zeros(len(x) - start, len(zeros[0].places)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _as_asked_for(x: Tensor, sizes: Sequence[int], *lists: Sequence[Tensor]) -> Tensor:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return _correction(x, sizes, *lists)  # a replay would read anew what a kernel was sent from the host
    return _asked_for.get(x.device.type, _correction)(x, sizes, *lists)


torch.library.impl("peft_mask::correction", "default", _correction)
torch.library.impl("peft_mask::correction", "cuda", _as_asked_for)


def _of_one_adapter(tokens: Tensor, zeros: Zeros) -> Tensor:
    """Return `x Z^T` for tokens that have one Z."""
    return _bags(tokens.t().contiguous(), zeros).index_select(0, zeros.places.int()).t().contiguous()


def _of_one_token_each(tokens: Tensor, zeros: Sequence[Zeros]) -> Tensor:
    """Return `x Z^T` for as many tokens as there are Z, each with its own."""
    if tokens.device.type == "cpu" and (csr_matvec := compiled_product()) is not None:
        sums = _by_scipy(csr_matvec, tokens, zeros)
    else:
        sums = torch.cat([_bags(token.unsqueeze(1), own) for token, own in zip(tokens.unbind(), zeros, strict=True)])
    first = torch.arange(0, len(zeros) * len(zeros[0].places), len(zeros[0].places), device=tokens.device)
    places = torch.stack([own.places for own in zeros]) + first.int().unsqueeze(1)
    return sums.view(-1).index_select(0, places.view(-1)).view(len(tokens), -1).to(tokens.dtype)


def _bags(table: Tensor, zeros: Zeros) -> Tensor:
    """Return for each sorted output the sum of the rows of an (in, tokens) table, times the values."""
    return torch.embedding_bag(table, zeros.columns.int(), zeros.pointers, False, 0, False, zeros.values, True)[0]


def _by_scipy(csr_matvec: Callable[..., None], tokens: Tensor, zeros: Sequence[Zeros]) -> Tensor:
    wide = torch.promote_types(tokens.dtype, torch.float32)
    (count, width), out = tokens.shape, zeros[0].places.shape[0]
    sums = torch.zeros(count, out, dtype=wide)
    for token, own, into in zip(tokens.detach().to(wide).contiguous().numpy(), zeros, sums.numpy(), strict=True):
        csr_matvec(out, width, *own.arrays(), token, into)
    return sums


@cache
def compiled_product() -> Callable[..., None] | None:
    """Return scipy's product of a sparse matrix and a vector, without what scipy does around it; None without scipy.

    For one token a bag takes twice its time.
    """
    try:
        from scipy.sparse._sparsetools import csr_matvec
    except ImportError:
        return None
    return cast("Callable[..., None]", csr_matvec)


def _fake(x: Tensor, sizes: Sequence[int], *zeros: Sequence[Tensor]) -> Tensor:
    (*_, places) = zeros
    return x.new_empty(len(x), len(places[0]))


torch.library.register_fake("peft_mask::correction", _fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.sizes, pointers, columns, values, places = inputs
    ctx.save_for_backward(*pointers, *columns, *values, *places)
    ctx.width = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """`dL/dx = dL/dy Z`: the same weights, added from outputs to inputs; as the output summed in float32 at least."""
    count, wide = len(ctx.sizes), torch.promote_types(grad.dtype, torch.float32)
    saved = [ctx.saved_tensors[start : start + count] for start in range(0, 4 * count, count)]
    parts = []
    for tokens, *own in zip(grad.split([*ctx.sizes, len(grad) - sum(ctx.sizes)]), *saved, strict=False):
        zeros = Zeros(*own)
        into = tokens.t()[zeros.places.argsort()].to(wide)  # dL/dy by sorted output
        added = into[torch.repeat_interleave(zeros.pointers.diff().long())] * zeros.values.unsqueeze(1)
        sums = into.new_zeros(ctx.width, len(tokens)).index_add_(0, zeros.columns.int(), added)
        parts.append(sums.t().to(grad.dtype))
    parts.append(grad.new_zeros(len(grad) - sum(ctx.sizes), ctx.width))
    nothing = [None] * count
    return torch.cat(parts), None, nothing, nothing, nothing, nothing


torch.library.register_autograd("peft_mask::correction", _backward, setup_context=_keep)
