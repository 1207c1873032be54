"""Elements of a tensor at row-major positions: read, written and left out, faster than by `Tensor.take` and `put_`.

`put_` besides raises under `torch.use_deterministic_algorithms`, since positions might repeat. Here none does. Elements
are moved as integers of their size: as floating numbers some would come out as others, such as NaN in bfloat16.
"""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the elements at these positions, of one dimension.

    Args:
        tensor: of any shape and strides, and a dtype of at most 8 bytes.
        positions: (n,) int32 or int64, row-major, on its device.
    """
    bits = _bits(tensor)
    taken = bits.view(-1).index_select(0, positions) if bits.is_contiguous() else bits.take(positions.long())
    return taken.view(tensor.dtype)


def without(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy with +0.0 at these positions.

    Args:
        tensor: of any shape and strides, and a dtype of at most 8 bytes.
        positions: (n,) int32 or int64, row-major, on its device. The number of elements is the position of none: so
            a list of fixed length can hold fewer.
    """
    copy = tensor.new_empty(tensor.numel() + 1)  # the last for the position of none
    kept = copy[:-1].view(tensor.shape)
    kept.copy_(tensor)
    # torch fills no 8-bit numbers, and its compiler none under a view of another dtype
    (_bits(copy) if copy.dtype.itemsize == 1 else copy).index_fill_(0, positions.long(), 0)
    return kept


def put(tensor: torch.Tensor, positions: torch.Tensor, elements: torch.Tensor) -> None:
    """Write elements to these positions, in place.

    Args:
        tensor: of any shape and strides, and a dtype of at most 8 bytes.
        positions: (n,) int64, row-major, on its device, no two alike.
        elements: (n,) of its dtype, on its device.
    """
    bits, new = _bits(tensor), _bits(elements)
    if bits.is_contiguous():
        bits.view(-1).scatter_(0, positions, new)
    else:
        bits[torch.unravel_index(positions, bits.shape)] = new


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])
