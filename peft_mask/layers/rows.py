"""The rows of a batch that belong to different adapters: those of one together, and back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BASE = "__base__"  # PEFT's word for no adapter

_owners: ContextVar[frozenset[str] | None] = ContextVar("owners", default=None)


@contextmanager
def batch_of(owners: Sequence[str]) -> Iterator[None]:
    """Say, to this thread alone, whose the rows are of the batch that it runs."""
    token = _owners.set(frozenset(owners))
    try:
        yield
    finally:
        _owners.reset(token)


def adapters_of_batch() -> frozenset[str] | None:
    """Return whose the rows are of the batch that this thread runs; None if all are the active adapters'."""
    return _owners.get()


def forward_rows(
    x: torch.Tensor, owners: Sequence[str], forward: Callable[[str, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Compute each row of a batch in the name of its owner.

    Args:
        x: tensor of any shape; its rows are along the first dimension.
        owners: a name for each row.
        forward: computes the rows of one owner from name and rows.

    Returns:
        What `forward` returned, row by row in the order of `x`.

    Raises:
        ValueError: if there are not as many names as rows.
    """
    if len(x) != len(owners):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(owners)} and {len(x)} respectively."
        )
    rows: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    outputs = [forward(owner, x[indices]) for owner, indices in rows.items()]
    order = torch.tensor([row for indices in rows.values() for row in indices], device=x.device)
    return torch.cat(outputs)[order.argsort()]
