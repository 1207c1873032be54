"""Leases: adapters that stay in the model as long as somebody computes with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from peft_mask.layers.rows import BASE
from peft_mask.serving.resident import Version


@dataclass(frozen=True)
class Adapter:
    """The version of an adapter that a lease has.

    Attributes:
        name: as it was asked for.
        digest: tells this version from others.
        labels: names of its labels, in the order of the logits, from `labels.json` in its folder; None without one.
        num_labels: how many labels it has: logits after these many are not its own. None if the model's head has no
            layer with `config.num_labels` outputs.
    """

    name: str
    digest: str
    labels: tuple[str, ...] | None
    num_labels: int | None


class Rows(list[str]):
    """What `adapter_names` takes: the name of a slot for each row.

    Attributes:
        adapters: the adapter of each row, in the version that is leased; None for rows of `"__base__"`.
    """

    def __init__(self, slots: Iterable[str], adapters: Iterable[Adapter | None]) -> None:
        super().__init__(slots)
        self.adapters = tuple(adapters)

    @classmethod
    def of(cls, names: Sequence[str], versions: Iterable[Version]) -> Rows:
        """Return the rows of some names, whose versions are in slots."""
        slots, adapters = {BASE: BASE}, {}
        for own in versions:
            slots[own.name] = str(own.slot)
            adapters[own.name] = Adapter(own.name, own.coded.digest, own.coded.labels, own.coded.num_labels)
        return cls(map(slots.__getitem__, names), map(adapters.get, names))


@dataclass(eq=False)
class Grant:
    """What a lease got: names of slots, and the versions in them."""

    rows: Rows
    versions: list[Version]


class Lease:
    """Adapters for the time of a `with` block, or of an `async with` block, which does not block the event loop.

    Entering it gives `Rows`: what `adapter_names` takes, and which adapters these are.

    Args:
        now: returns a grant if nothing is to be waited for, else None.
        wait: returns a grant once it is there, or raises.
        give_back: takes a grant back.
        executor: returns whose threads wait for a task of asyncio.
    """

    def __init__(
        self,
        now: Callable[[], Grant | None],
        wait: Callable[[], Grant],
        give_back: Callable[[Any], None],
        executor: Callable[[], Executor],
    ) -> None:
        self._now, self._wait, self._give_back, self._executor = now, wait, give_back, executor
        self._grants: list[Grant] = []

    def __enter__(self) -> Rows:
        return self._hold(self._now() or self._wait())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back(self._grants.pop())

    async def __aenter__(self) -> Rows:
        if (grant := self._now()) is not None:
            return self._hold(grant)
        waiting = self._executor().submit(self._wait)
        try:
            return self._hold(await asyncio.wrap_future(waiting))
        except asyncio.CancelledError:
            # the thread may be past the point where it can be stopped: what it gets is given back when it has it
            if not waiting.cancel():
                waiting.add_done_callback(self._give_back_what_came)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _hold(self, grant: Grant) -> Rows:
        self._grants.append(grant)
        return grant.rows

    def _give_back_what_came(self, waiting: Any) -> None:
        if not waiting.cancelled() and waiting.exception() is None:
            self._give_back(waiting.result())
