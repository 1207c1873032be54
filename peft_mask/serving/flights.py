"""Loads that several wait for, and adapters that were refused: neither is tried by each of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from peft_mask.serving.errors import AdapterRefusedError

_MOST_REFUSALS = 1024  # whoever asks for names that are not there must not fill the memory with them


class Flight:
    """A load that some wait for.

    Attributes:
        waiting: how many they are.
        folder: where the adapter is, once that is known.
        located: whether nobody looks for it any more.
        error: what came of it, if it failed.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.folder: Path | None = None
        self.located = False
        self.error: AdapterRefusedError | None = None


class Flights:
    """Loads that are going on, and refusals that are remembered, by the names of adapters.

    It knows nothing of threads: who uses it holds a lock.

    Args:
        seconds: for how long a refusal is remembered.
        clock: tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self._going_on: dict[str, Flight] = {}
        self._refused: dict[str, tuple[float, AdapterRefusedError]] = {}

    def join(self, name: str) -> tuple[Flight, bool]:
        """Return the load of an adapter, and whether it is the caller who begins it.

        Raises:
            AdapterRefusedError: the adapter was refused a short while ago.
        """
        until, error = self._refused.get(name, (0.0, None))
        if error is not None and self.clock() < until:
            raise again(error)
        self._refused.pop(name, None)
        first = name not in self._going_on
        flight = self._going_on.setdefault(name, Flight())
        flight.waiting += 1
        return flight, first

    def leave(self, name: str, flight: Flight) -> None:
        """Wait no more."""
        flight.waiting -= 1
        if not flight.waiting and self._going_on.get(name) is flight:
            del self._going_on[name]

    def fail(self, name: str, error: AdapterRefusedError) -> None:
        """Let all who wait for an adapter have this error, and those who ask for it in the next seconds."""
        error = again(error)  # without the traceback, which holds on to tensors
        if (flight := self._going_on.pop(name, None)) is not None:
            flight.error = error
        if self.seconds > 0:
            if len(self._refused) >= _MOST_REFUSALS:
                del self._refused[next(iter(self._refused))]
            self._refused[name] = self.clock() + self.seconds, error

    def look_anew(self, name: str) -> bool:
        """Let those who load an adapter look for its folder anew; returns whether there are any."""
        if (flight := self._going_on.get(name)) is None:
            return False
        flight.folder = None
        return True

    def forget(self, name: str) -> None:
        """Forget that an adapter was refused."""
        self._refused.pop(name, None)


def again(error: AdapterRefusedError) -> AdapterRefusedError:
    """Return the same error to be raised by another thread: a traceback is one thread's."""
    return type(error)(error.name, error.reason)
