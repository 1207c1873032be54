"""Elements of a tensor at row-major positions: read and written, several times as fast as `Tensor.take` and `put_`.

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
        positions: (n,) int64, row-major, on its device.
    """
    bits = _bits(tensor)
    taken = bits.view(-1).index_select(0, positions) if bits.is_contiguous() else bits.take(positions)
    return taken.view(tensor.dtype)


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
