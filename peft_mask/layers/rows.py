"""Whose the rows of a batch are: said once a call, read by every layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

BASE = "__base__"  # PEFT's word for no adapter

_in_force: ContextVar[Rows | None] = ContextVar("rows", default=None)


class Groups(NamedTuple):
    """Rows in an order in which those of one adapter stand together.

    Attributes:
        small: adapter name -> how many rows it has, in that order; those of no adapter, as `BASE`, are the last.
        large: the same for adapters with many rows, which stand behind these.
        order: (rows,) int64, which row stands where; None if they stand so already.
        back: (rows,) int64, where each row went; None as well then.
    """

    small: dict[str, int]
    large: dict[str, int]
    order: torch.Tensor | None
    back: torch.Tensor | None


class Rows:
    """The owners of the rows of one batch.

    Args:
        names: an adapter's name for each row, or `BASE`.
        copies: how many rows may come of each, one after another, in some of the calls.
        layers: the layers that they are told to.
        exact: whether the bits are to be those of merged weights.
    """

    def __init__(
        self, names: Sequence[str], copies: Set[int] = frozenset(), layers: Iterable[object] = (), exact: bool = False
    ) -> None:
        self.names = tuple(names)
        self.owners = frozenset(names)
        self.exact = exact
        self._copies = copies
        self._layers = frozenset(map(id, layers))
        self._groups: dict[tuple[object, ...], Groups] = {}

    def told_to(self, layer: object) -> bool:
        """Return whether they are told to a layer."""
        return id(layer) in self._layers

    def are_in_force(self) -> bool:
        """Return whether it is these rows that this thread, or this task of asyncio, computes with."""
        return _in_force.get() is self

    def repeated(self, count: int) -> tuple[str, ...]:
        """Return the names for a batch of so many rows, as many as there are, or some copies of each.

        Raises:
            ValueError: if neither fits.
        """
        times, rest = divmod(count, max(len(self.names), 1))
        if not rest and times in self._copies:
            return tuple(name for name in self.names for _ in range(times))
        if count != len(self.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {count} respectively."
            )
        return self.names

    def groups(self, count: int, known: Set[str], many: float, device: torch.device) -> Groups:
        """Return which of `count` rows belong together, found once a call for all layers that are alike.

        Args:
            count: number of rows.
            known: adapters whose rows are theirs; all others are of none.
            many: how many rows an adapter has at least to be one of the large.
            device: where `order` and `back` are.
        """
        key = (count, self.owners & known, many, device)
        if key not in self._groups:
            self._groups[key] = _grouped([n if n in known else BASE for n in self.repeated(count)], many, device)
        return self._groups[key]


def _grouped(owners: Sequence[str], many: float, device: torch.device) -> Groups:
    rows: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    large = {name for name, own in rows.items() if len(own) >= many and name != BASE}
    # those with equally many together, else as they came
    names = sorted(rows, key=lambda name: (name in large, name == BASE, len(rows[name])))
    order = [row for name in names for row in rows[name]]
    small, wide = ({name: len(rows[name]) for name in names if (name in large) == which} for which in (False, True))
    if order == sorted(order):
        return Groups(small, wide, None, None)
    index = torch.tensor(order)
    return Groups(small, wide, index.to(device), index.argsort().to(device))


@contextmanager
def in_force(rows: Rows) -> Iterator[None]:
    """Tell the layers whose the rows are that this thread, or this task of asyncio, computes with."""
    token = _in_force.set(rows)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _in_force.reset(token)


def rows_for(layer: object) -> Rows | None:
    """Return whose the rows are of the batch that a layer is called with; None if all are the active adapters'."""
    rows = _in_force.get()
    return rows if rows is not None and rows.told_to(layer) else None


class _Anywhere:
    """Whether any thread computes a batch of several adapters: torch.compile can look at this, and at no context."""

    lock = threading.Lock()
    calls = 0
    yes = False


def _count(change: int) -> None:
    with _Anywhere.lock:
        _Anywhere.calls += change
        _Anywhere.yes = _Anywhere.calls > 0


def may_be_mixed() -> bool:
    """Return whether a call may be one of several adapters, for code that is compiled; who runs it asks `rows_for`."""
    return _Anywhere.yes


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
    """
    sizes, _, order, back = _grouped(owners, math.inf, x.device)
    parts = (x if order is None else x[order]).split(list(sizes.values()))
    outputs = torch.cat([forward(owner, rows) for owner, rows in zip(sizes, parts, strict=True)])
    return outputs if back is None else outputs[back]
