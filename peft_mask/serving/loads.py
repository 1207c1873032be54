"""How an adapter is found, by one of those who wait for it, and how what goes wrong reaches all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peft_mask.serving.errors import AdapterRefusedError
from peft_mask.serving.flights import Flight, Flights, again
from peft_mask.serving.source import check_name
from peft_mask.serving.turns import Turns


class Loads:
    """Loads of adapters that threads share.

    Args:
        turns: whose lock is held around the flights.
        flights: what is going on, and what was refused.
        locate: finds the folder of an adapter whose name was checked.
    """

    def __init__(self, turns: Turns, flights: Flights, locate: Callable[[str], Path]) -> None:
        self.locate = locate
        self._turns = turns
        self._lock = turns.lock
        self._flights = flights

    def join(self, name: str, stack: ExitStack) -> tuple[Flight, bool]:
        """Wait for an adapter until the stack is left, and say whether to look for it; the lock is held."""
        flight, first = self._flights.join(name)
        stack.callback(self.leave, name, flight)
        return flight, first

    def leave(self, name: str, flight: Flight) -> None:
        """Wait no more."""
        with self._lock:
            self._flights.leave(name, flight)

    def find_together(self, name: str, flight: Flight, first: bool, deadline: float) -> None:
        """Find an adapter's folder, or wait until another thread has found it."""
        if not first:
            with self._lock:
                self._turns.wait_for(lambda: flight.located, deadline, f"{name!r} is looked for")
            return
        try:
            flight.folder = self.find(name)
        finally:
            with self._lock:
                flight.located = True
                self._lock.notify_all()

    def find(self, name: str) -> Path:
        """Return an adapter's folder."""
        with self.refusing(name):
            return self.locate(check_name(name))

    @contextmanager
    def refusing(self, name: str) -> Iterator[None]:
        """Let whatever goes wrong in reading an adapter reach all who wait for it, in its name."""
        try:
            yield
        except Exception as error:
            refused = error if isinstance(error, AdapterRefusedError) else AdapterRefusedError(name, str(error))
            with self._lock:
                self._flights.fail(name, refused)
                self._lock.notify_all()
            if refused is error:
                raise
            raise refused from error

    @staticmethod
    def raise_if_refused(flights: Sequence[Flight]) -> None:
        """Raise what came of the first load that failed."""
        for flight in flights:
            if flight.error is not None:
                raise again(flight.error)
