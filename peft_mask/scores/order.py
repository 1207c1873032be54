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
    if is_in_numpy(flat):
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
    limit = ascending.index_select(0, (count - 1).clamp(0, most - 1).view(1))
    return _up_to(flat, _unless_nan(limit).clamp(max=below), count).view(values.shape)


def lowest_positions(
    values: torch.Tensor, count: int | torch.Tensor, most: int, below: float = torch.inf
) -> torch.Tensor:
    """Return where `lowest(row, count, below)` is True in each row of values, without reading anything back.

    Args:
        values: two dimensions, as for `lowest`.
        count: as for `lowest`, at least one; in a tensor without dimensions as for `lowest_among`.
        most: the largest count, from 1 to the number of columns.
        below: as for `lowest`.

    Returns:
        int64 of shape (rows, most), in no order. If fewer are marked, the number of columns stands for the rest.
    """
    values = values.detach()
    rows, columns = values.shape
    ascending = values.topk(most, largest=False, sorted=not isinstance(count, int)).values
    if isinstance(count, int):
        limit = ascending.amax(1, keepdim=True)
    else:
        limit = ascending.index_select(1, (count - 1).clamp(0, most - 1).view(1))
    limit = _unless_nan(limit).clamp(max=below)
    under, at = values < limit, values == limit
    # of all that are under the limit there are fewer than `count` in a row, and so less than `rows * most`
    under_it = _true_positions(under.view(-1), rows * most)
    at_it = torch.stack([_true_positions(row, most) for row in at])
    found = under.sum(1, keepdim=True)
    place = torch.arange(most, device=values.device)
    start = found.cumsum(0) - found
    row = torch.arange(0, rows * columns, columns, device=values.device).unsqueeze(1)
    in_row = under_it.take((start + place).clamp(max=rows * most - 1)) - row
    rest = at_it.gather(1, (place - found).clamp(min=0))
    return torch.where(place < found, in_row, torch.where(place < count, rest, columns))


def _true_positions(marked: torch.Tensor, size: int) -> torch.Tensor:
    """Return where a mask of one dimension is True, in a tensor of a given length; its own length stands for none."""
    try:
        return torch.nonzero_static(marked, size=size, fill_value=marked.numel()).squeeze(1)
    except NotImplementedError:  # on CUDA before torch 2.7, on others until later; this waits for the device
        found = marked.nonzero().squeeze(1)[:size]
        return torch.nn.functional.pad(found, (0, size - len(found)), value=marked.numel())


def _up_to(values: torch.Tensor, limit: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Mark what is below a limit, and the first of those at it: `count` in all of a row, if there are as many."""
    under, at = values < limit, values == limit
    rank = at.cumsum(-1, dtype=index_dtype(values.shape[-1]))
    return under | (at & (rank <= count - under.sum(-1, keepdim=True)))


def nth_lowest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n-th lowest of the values, counted from one, as a tensor without dimensions.

    Args:
        values: one dimension, any floating dtype; NaN counts as infinity.
        n: from 1 to their number.
    """
    if is_in_numpy(values):
        # a copy also because FSDP2 frees the scores' storage, which could not be resized once numpy had seen it
        numbers = values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True).numpy()
        numbers.partition(n - 1)
        found = torch.from_numpy(numbers[n - 1 : n]).to(values.dtype).amax()
    else:
        found = values.topk(n, largest=False, sorted=False).values.amax()
    return _unless_nan(found)


def _unless_nan(value: torch.Tensor) -> torch.Tensor:
    return value.where(~value.isnan(), torch.inf)


def is_in_numpy(values: torch.Tensor) -> bool:
    """Return whether numpy puts these values in order."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
