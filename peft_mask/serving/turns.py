"""Turns: those who change what is in memory and in the slots do so one after the other, in the order they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft_mask.serving.errors import NoRoomError


class Turns:
    """A lock that wakes those who wait for something, and a queue before it.

    Who has the turn may let go of the lock, to read a file or to wait until a lease ends, and still be the only one who
    brings adapters in. So nobody who waits holds what another one waits for.

    Attributes:
        lock: what all that is counted is behind.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def turn(self, deadline: float, is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait for the turn, and have it. The lock is not held.

        Args:
            deadline: of `time.monotonic`, until when to wait.
            is_over: what lets the caller go on before its turn, to see that there is nothing left to do.

        Raises:
            NoRoomError: it was not the caller's turn by then.
        """
        ticket = object()
        with self.lock:
            self._queue.append(ticket)
        try:
            with self.lock:
                self.wait_for(lambda: self._queue[0] is ticket or is_over(), deadline, "others bring adapters in")
            yield
        finally:
            with self.lock:
                self._queue.remove(ticket)
                self.lock.notify_all()

    def wait_for(self, condition: Callable[[], bool], deadline: float, why: str) -> None:
        """Wait until a condition holds; the lock is held, and let go of meanwhile.

        Args:
            condition: what is looked at whenever something has changed.
            deadline: of `time.monotonic`, until when to wait.
            why: what the caller is waiting for, for the message.

        Raises:
            NoRoomError: it did not hold by then.
        """
        if not self.lock.wait_for(condition, max(deadline - time.monotonic(), 0)):
            raise NoRoomError(f"waited in vain: {why}. Give the cache more slots or bytes, or wait longer.")
