"""Products with masked weights, to the bit those of the merged ones, without forming each masked weight anew.

The base weight is copied once, zeros are written into the copy, and put back for the next mask. Where masks differ in
half a per cent of the weights that is a copy for all of them, and a scatter for each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_mask.tensors.elements import put, take

_memory = threading.local()  # a copy that is made anew in every layer spends more time on memory than on copying


def can_patch(weight: Tensor) -> bool:
    """Return whether a weight is one tensor in memory, whose elements can be counted through."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous() and not weight.is_meta


class Group(NamedTuple):
    """Tokens that have the same masks.

    Attributes:
        x: (..., in) tensor.
        off: row-major positions (int64) where each of their masks is off.
        bias: (out,) tensor or None.
        into: (tokens, out) tensor that their output is written to, if there is one already.
    """

    x: Tensor
    off: Sequence[Tensor]
    bias: Tensor | None
    into: Tensor | None = None


def patched_products(groups: Iterable[Group], weight: Tensor, *, transposed: bool = False) -> Iterator[Tensor]:
    """Yield `x (W * M)^T + b` for several groups of tokens, each under masks of its own.

    Not for a backward pass: the weight that a product was computed with is another one by the time of the next.

    Args:
        groups: what is multiplied.
        weight: (out, in) tensor for which `can_patch` holds; (in, out) if `transposed`.
        transposed: whether `weight` is stored as in transformers' `Conv1D`.

    Returns:
        (..., out) tensors, or those they were written to: the bits of `F.linear` with the merged weight.
    """
    copy = _room_for(weight).copy_(weight)
    for group in groups:
        for positions in group.off:
            copy.view(-1).index_fill_(0, positions, 0)
        yield _product(group, copy.t() if transposed else copy)
        for positions in group.off:
            put(copy, positions, take(weight, positions))


def _product(group: Group, weight: Tensor) -> Tensor:
    x, _, bias, into = group
    if into is None:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        return torch.mm(rows, weight.t(), out=into)
    return torch.addmm(bias, rows, weight.t(), out=into)


def aligned(x: Tensor) -> Tensor:
    """Return a part of a batch as it would lie in memory alone: where it does is told by the bits of its product."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def _room_for(weight: Tensor) -> Tensor:
    """Return memory of a weight's shape: on a CPU this thread's, which holds as much as its largest weight takes."""
    if weight.device.type != "cpu":
        return torch.empty_like(weight)  # torch keeps the memory of a GPU by itself, and knows when it is read
    held: Tensor | None = getattr(_memory, "bytes", None)
    if held is None or held.numel() < weight.nbytes:
        with torch.inference_mode(False):  # a tensor of that mode could not be written to outside of it
            held = _memory.bytes = torch.empty(weight.nbytes, dtype=torch.uint8)
    return held[: weight.nbytes].view(weight.dtype).view(weight.shape)
