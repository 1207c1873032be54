"""Elements of a tensor at row-major positions: read and written, several times as fast as `Tensor.take` and `put_`.

`put_` besides raises under `torch.use_deterministic_algorithms`, since positions might repeat. Here none does.
"""

from __future__ import annotations

import torch


def take(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the elements at these positions, of one dimension.

    Args:
        tensor: of any shape and strides.
        positions: (n,) int64, row-major, on its device.
    """
    return tensor.view(-1).index_select(0, positions) if tensor.is_contiguous() else tensor.take(positions)


def put(tensor: torch.Tensor, positions: torch.Tensor, elements: torch.Tensor) -> None:
    """Write elements to these positions, in place.

    Args:
        tensor: of any shape and strides.
        positions: (n,) int64, row-major, on its device, no two alike.
        elements: (n,) of its dtype, on its device.
    """
    if tensor.is_contiguous():
        tensor.view(-1).scatter_(0, positions, elements)
    else:
        tensor[torch.unravel_index(positions, tensor.shape)] = elements
