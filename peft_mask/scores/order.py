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
    if _in_numpy(flat):
        under, at = flat < limit, flat == limit
        marked, ties = under.numpy(), np.flatnonzero(at.numpy())
        marked[ties[: count - np.count_nonzero(marked)]] = True
        return under.view(values.shape)
    return _up_to(flat, limit, count).view(values.shape)


def lowest_among(values: torch.Tensor, count: torch.Tensor, most: int, below: float = torch.inf) -> torch.Tensor:
    """Return `lowest(values, count, below)` of a count in a tensor, which is never read.

    So `torch.compile` compiles once for all counts up to `most`, and a device is not waited for.

    Args:
        values: as for `lowest`.
        count: integer, no dimensions, on the device of `values`, from 0 to `most`.
        most: how many values are put in order, whatever the count.
        below: as for `lowest`.
    """
    flat = values.detach().reshape(-1)
    if (most := min(most, flat.numel())) <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    ascending = flat.topk(most, largest=False, sorted=True).values
    limit = ascending.index_select(0, (count - 1).clamp(0, most - 1).view(1)).squeeze(0)
    return _up_to(flat, _unless_nan(limit).clamp(max=below), count).view(values.shape)


def _up_to(flat: torch.Tensor, limit: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Mark what is below a limit, and the first of those at it: `count` in all, if there are as many."""
    under, at = flat < limit, flat == limit
    rank = at.cumsum(0, dtype=index_dtype(flat.numel()))
    return under | (at & (rank <= count - under.sum()))


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
    return _unless_nan(found)


def _unless_nan(value: torch.Tensor) -> torch.Tensor:
    return value.where(~value.isnan(), torch.inf)


def _in_numpy(values: torch.Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
