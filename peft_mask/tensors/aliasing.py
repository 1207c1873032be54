"""Which tensors lie in the same memory, as tied weights do that are different parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

SomeTensor = TypeVar("SomeTensor", bound=torch.Tensor)


def sharing_memory(tensors: Iterable[SomeTensor]) -> list[list[SomeTensor]]:
    """Return those groups of tensors, of two or more, that have elements in common.

    Tensors without memory of their own, such as those on the meta device and distributed ones, are in no group; nor are
    parts of one tensor that lie one after another, or side by side in its rows.
    """
    storages: dict[int, list[SomeTensor]] = {}
    for tensor in tensors:
        if address := _address(tensor):
            storages.setdefault(address, []).append(tensor)
    groups = []
    for together in storages.values():
        for near in _overlapping_spans(together):
            while len(near) > 1:
                group: list[SomeTensor] = [near[0]]
                apart: list[SomeTensor] = []
                for tensor in near[1:]:
                    (group if any(_overlap(tensor, other) for other in group) else apart).append(tensor)
                if len(group) > 1:
                    groups.append(group)
                near = apart
    return groups


def _overlapping_spans(tensors: list[SomeTensor]) -> list[list[SomeTensor]]:
    """Return the tensors in runs of those whose spans of memory touch, which few do if a file was mapped as one."""
    runs: list[list[SomeTensor]] = []
    reached = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
        if tensor.data_ptr() < reached:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
        reached = max(reached, _end(tensor))
    return runs


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # a tensor that only stands for others
        return 0


def _end(tensor: torch.Tensor) -> int:
    """Return where the memory that a tensor reaches ends."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.data_ptr() >= _end(other) or other.data_ptr() >= _end(one):
        return False
    row = one.stride()[:1]
    if one.dim() < 2 or row != other.stride()[:1] or one.dtype != other.dtype:
        return True
    # rows of one tensor, and of each a part: apart if one part ends before the other begins
    pitch = row[0] * one.element_size()
    starts = [(tensor.data_ptr() - tensor.untyped_storage().data_ptr()) % pitch for tensor in (one, other)]
    ends = [start + _end(tensor[0]) - tensor.data_ptr() for start, tensor in zip(starts, (one, other), strict=True)]
    return max(ends) > pitch or (starts[0] < ends[1] and starts[1] < ends[0])
