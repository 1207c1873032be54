"""Leases: adapters that stay in the model as long as somebody computes with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Protocol


class Grant(Protocol):
    """What a lease got."""

    rows: list[str]


class Lease:
    """Adapters for the time of a `with` block, or of an `async with` block, which does not block the event loop.

    Entering it gives what `adapter_names` takes: the name of a slot for each row.

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

    def __enter__(self) -> list[str]:
        return self._hold(self._now() or self._wait())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back(self._grants.pop())

    async def __aenter__(self) -> list[str]:
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

    def _hold(self, grant: Grant) -> list[str]:
        self._grants.append(grant)
        return grant.rows

    def _give_back_what_came(self, waiting: Any) -> None:
        if not waiting.cancelled() and waiting.exception() is None:
            self._give_back(waiting.result())
