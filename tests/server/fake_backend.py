"""A backend that computes nothing: what each adapter answers is said beforehand. And a server for a test's time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from peft_mask.server.errors import as_data
from peft_mask.server.service import Outcome, Question

PATIENCE = 60  # seconds until a server must have started


class FakeBackend:
    """A `Backend`.

    Args:
        answers: adapter -> its answer, an error that it refuses with, or a function of the input that returns one.

    Attributes:
        asked: the questions and options of each request.
    """

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers
        self.asked: list[tuple[list[Question], dict[str, Any]]] = []

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        self.asked.append(([*questions], {**options}))
        return [self._outcome(*question) for question in questions]

    async def adapters(self) -> list[str]:
        return [name for name in self._answers if name != "__base__"]

    async def refresh(self, name: str) -> list[Outcome]:
        return [{"output": False}]

    async def figures(self) -> list[dict[str, float]]:
        return [{}]

    async def check(self) -> None:
        pass

    def _outcome(self, name: str, item: object) -> Outcome:
        answer = self._answers[name]
        answer = answer(item) if callable(answer) else answer
        return {"error": as_data(answer)} if isinstance(answer, Exception) else {"output": answer}


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Let an application answer on a free port of this machine; the address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive(), "the server ended before it had started"
            if time.monotonic() > end:
                raise TimeoutError(f"the server has not started in {PATIENCE} seconds")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
