"""The lowest of many numbers: the scores that are off, and, counted from the other end, the weights that have some.

On a CPU numpy does it, which sorts no more than it has to: several times as fast as torch. On other devices, and where
`torch.compile` looks, no tensor is read back, so that nothing waits for the device and there is one graph.
"""

from __future__ import annotations

import numpy as np
import torch

from peft_mask.format.packing import index_dtype


def lowest(values: torch.Tensor, count: int, below: float = torch.inf) -> torch.Tensor:
    """Mark the `count` lowest values among those that are at most `below`: bool, of the shape of `values`.

    Ties go to the first in row-major order, so that the result is the same on every device. NaN is no low value.
    """
    flat = values.detach().reshape(-1)
    count = min(count, flat.numel())
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = nth_lowest(flat, count).clamp(max=below)
    under, at = flat < limit, flat == limit
    if _in_numpy(flat):
        marked, ties = under.numpy(), np.flatnonzero(at.numpy())
        marked[ties[: count - np.count_nonzero(marked)]] = True
        return under.view(values.shape)
    rank = at.cumsum(0, dtype=index_dtype(flat.numel()))
    return (under | (at & (rank <= count - under.sum()))).view(values.shape)


def nth_lowest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n-th lowest of the values, counted from one, as a tensor without dimensions.

    Args:
        values: one dimension, any floating dtype; NaN counts as infinity.
        n: from 1 to their number.
    """
    if _in_numpy(values):
        # a copy also because FSDP2 frees the scores' storage, which could not be resized once numpy had seen it
        numbers = values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True).numpy()
        numbers.partition(n - 1)
        found = torch.from_numpy(numbers[n - 1 : n]).to(values.dtype).amax()
    else:
        found = values.topk(n, largest=False, sorted=False).values.amax()
    return found.where(~found.isnan(), torch.inf)


def _in_numpy(values: torch.Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
