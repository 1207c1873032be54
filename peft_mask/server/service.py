"""What a server does for one request, in words that need no HTTP: rows in, answers or errors out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from peft_mask.server.batcher import Batcher
from peft_mask.server.errors import as_data
from peft_mask.serving.source import without_place

Question = tuple[str, object]  # the name of an adapter, and an input
Outcome = dict[str, Any]  # {"output": ...}, or {"error": ...} as `errors.as_data` gives it


class Backend(Protocol):
    """What HTTP is put in front of: the service in this process, or replicas of it elsewhere."""

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        """Return what came of each question, in their order."""

    async def adapters(self) -> list[str]:
        """Return the names that the source has now."""

    async def refresh(self, name: str) -> list[Outcome]:
        """Read an adapter anew, everywhere, and return what came of it at each place."""

    async def figures(self) -> list[dict[str, float]]:
        """Return the figures of each place by name."""

    async def check(self) -> None:
        """Raise unless a row is computed."""


class Service:
    """A `Backend` in this process.

    Args:
        batcher: what computes.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    async def answers(self, questions: Sequence[Question], options: Mapping[str, Any]) -> list[Outcome]:
        return list(await asyncio.gather(*(self._answer(*question, options) for question in questions)))

    async def adapters(self) -> list[str]:
        return await asyncio.to_thread(self.batcher.cache.names)

    async def refresh(self, name: str) -> list[Outcome]:
        try:
            return [{"output": await asyncio.to_thread(self.batcher.cache.refresh, name)}]
        except Exception as error:
            return [self._told(error)]

    async def figures(self) -> list[dict[str, float]]:
        cache = {f"cache_{name}": value for name, value in asdict(self.batcher.cache.stats()).items()}
        return [asdict(self.batcher.statistics) | cache]

    async def check(self) -> None:
        await self.batcher.check()

    async def _answer(self, name: str, item: object, options: Mapping[str, Any]) -> Outcome:
        try:
            return {"output": await self.batcher.ask(name, item, **options)}
        except Exception as error:
            return self._told(error)

    def _told(self, error: Exception) -> Outcome:
        data = as_data(error)
        return {"error": data | {"message": without_place(str(data["message"]), self.batcher.cache.source)}}
