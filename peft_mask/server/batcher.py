"""`Batcher`: requests that come one by one are computed many at a time, whichever adapters they are for."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from peft_mask.layers.rows import BASE
from peft_mask.server.errors import InvalidInputError, OverloadedError
from peft_mask.server.statistics import Statistics
from peft_mask.server.tasks.task import Row, Task
from peft_mask.serving.cache import AdapterCache
from peft_mask.serving.lease import Adapter, Lease

_log = logging.getLogger(__name__)
_STOPS = "the server stops: ask another one."


@dataclass(eq=False)
class _Waiting:
    row: Row
    adapter: str  # the name of a slot
    labels: Sequence[str] = ()
    lease: Lease | None = None
    is_computed: bool = False
    answer: asyncio.Future[Any] = field(init=False)

    def give_back(self) -> None:
        if self.lease is not None:
            self.lease.__exit__(None, None, None)
            self.lease = None


class Batcher:
    """Answers to single inputs, which are computed in batches over all adapters.

        batcher = Batcher(cache, Classification(tokenizer))
        answer = await batcher.ask("banking77", "Where is my card?")

    Each request leases its adapter, and waits for it alone; what has its adapter waits for the model. While the model
    computes one batch, in a thread of its own, the next one fills. If a batch fails, its halves are tried, down to
    single rows, so that a row fails alone. It belongs to the event loop that it was first asked in.

    Args:
        cache: the adapters, and the model.
        task: what is asked.
        max_rows: rows of a batch at most.
        max_tokens: tokens of a batch at most, padding included. One row may have more.
        max_wait: for how many seconds a batch that is not full waits for more, where the model has nothing to do.
        max_waiting: how many requests may wait; one more is refused at once.

    Attributes:
        statistics: what was asked so far.

    Raises:
        ValueError: a number is below 1, or a time below 0.
    """

    def __init__(
        self,
        cache: AdapterCache,
        task: Task,
        *,
        max_rows: int = 32,
        max_tokens: int = 16_384,
        max_wait: float = 0.0,
        max_waiting: int = 1024,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if max_wait < 0:
            raise ValueError(f"max_wait must be at least 0 seconds, got {max_wait}.")
        self.cache, self.task = cache, task
        self.max_rows, self.max_tokens, self.max_wait, self.max_waiting = max_rows, max_tokens, max_wait, max_waiting
        self.statistics = Statistics()
        self._queue: deque[_Waiting] = deque()
        self._inside = 0  # requests that wait for their adapter, for the model or in it
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="peft_mask-model")
        self._loop: asyncio.Task[None] | None = None
        self._checking: asyncio.Future[Any] | None = None
        self._is_closing = False

    async def ask(self, adapter: str, item: object, **options: Any) -> Any:
        """Return the answer of an adapter to one input.

        Args:
            adapter: its name, or `"__base__"` where the task says that the base alone has an answer.
            item: a text, or a mapping with "text" and "text_pair".
            options: of the task.

        Raises:
            InvalidInputError: the input or an option has no meaning.
            AdapterRefusedError: the adapter is damaged or not for this base; `UnknownAdapterError`: there is none.
            NoRoomError: others had all slots for too long.
            OverloadedError: too many requests wait.
        """
        if adapter == BASE and not self.task.answers_base:
            raise InvalidInputError("the base has no head for this task: name an adapter.")
        if self._inside >= self.max_waiting:
            raise OverloadedError(f"{self.max_waiting} requests wait already: ask again later.")
        row = self.task.encode(item, options)
        self._inside += 1
        try:
            lease = self.cache.lease([adapter])
            leased = await lease.__aenter__()
            waiting = _Waiting(row, leased[0], lease=lease)
            try:
                waiting.labels = self._labels_of(leased.adapters[0])
                return await self._computed(waiting)
            finally:
                if not waiting.is_computed:  # who asked may go while the model computes with the adapter
                    waiting.give_back()
        finally:
            self._inside -= 1

    async def check(self, text: str = "health") -> None:
        """Compute one row with the base, before all that wait. Who asks while it is computed gets what comes of that.

        Raises:
            Exception: whatever is wrong with the model.
        """
        if self._checking is None or self._checking.done():
            row = replace(self.task.encode(text, {}), key=object())  # in a batch of its own
            self._checking = asyncio.ensure_future(self._computed(_Waiting(row, BASE, labels=[""])))
        await asyncio.shield(self._checking)

    async def close(self) -> None:
        """Answer what is being computed, and tell all who wait that the server stops."""
        self._is_closing = True
        self._arrived.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    def _labels_of(self, adapter: Adapter | None) -> Sequence[str]:
        """Return the names of an adapter's labels: its own, or the base's, or numbers if nobody knows any."""
        if adapter is not None and adapter.labels is not None:
            return adapter.labels
        config: Any = self.cache.model.get_base_model().config
        count: int = getattr(config, "num_labels", 0)
        if adapter is not None and adapter.num_labels is not None:
            count = adapter.num_labels
        names = config.id2label if len(getattr(config, "id2label", ())) == count else {}
        return [str(names.get(number, f"LABEL_{number}")) for number in range(count)]

    # ---- in the event loop ----

    async def _computed(self, waiting: _Waiting) -> Any:
        loop = asyncio.get_running_loop()
        if self._is_closing:
            raise OverloadedError(_STOPS)
        if self._loop is None:
            self._loop = loop.create_task(self._run())
        elif self._loop.get_loop() is not loop:
            raise RuntimeError(
                "a Batcher belongs to the event loop that it was first asked in: make one for each loop."
            )
        waiting.answer = loop.create_future()
        (self._queue.append if waiting.lease is not None else self._queue.appendleft)(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self.max_wait and len(self._queue) < self.max_rows:
                await asyncio.sleep(self.max_wait)
            if self._is_closing:
                break
            if not (batch := self._next()):
                continue
            answers = await loop.run_in_executor(self._thread, self._compute, batch)
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.is_computed = False
                if waiting.answer.done():
                    waiting.give_back()
                elif isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
        for waiting in self._queue:
            if not waiting.answer.done():
                waiting.answer.set_exception(OverloadedError(_STOPS))
        self._queue.clear()

    def _next(self) -> list[_Waiting]:
        """Take the rows of the next batch out of the queue: who waits longest, and whoever fits beside."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        longest, most_new = 0, 0
        for waiting in self._queue:
            if waiting.answer.done():
                continue
            wide, new = max(longest, waiting.row.length), max(most_new, waiting.row.new)
            fits = not batch or (
                len(batch) < self.max_rows
                and waiting.row.key == batch[0].row.key
                and wide + new <= self.task.max_length  # each fits alone; padded to the longest all must
                and (wide + new) * (len(batch) + 1) <= self.max_tokens
            )
            if fits:
                waiting.is_computed = True
                batch.append(waiting)
                longest, most_new = wide, new
            else:
                left.append(waiting)
        self._queue = left
        if not left:
            self._arrived.clear()
        rows = Counter(waiting.adapter for waiting in batch)  # in this order no layer has to put them in another
        return sorted(batch, key=lambda waiting: (waiting.adapter == BASE, rows[waiting.adapter], waiting.adapter))

    # ---- in the thread of the model ----

    def _compute(self, batch: Sequence[_Waiting]) -> list[Any]:
        """Return for each row its answer, or why there is none."""
        try:
            answers: list[Any] = self.task.compute(
                self.cache.model,
                [waiting.row for waiting in batch],
                [waiting.adapter for waiting in batch],
                [waiting.labels for waiting in batch],
            )
            if len(answers) != len(batch):
                raise RuntimeError(f"the task has {len(answers)} answers for {len(batch)} rows")
        except Exception as error:
            failed: Exception = error if not isinstance(error, StopIteration) else RuntimeError("the task stopped")
            _log.warning("a batch of %s rows failed", len(batch), exc_info=True)
        else:
            adapters = {waiting.adapter for waiting in batch}
            self.statistics.count(len(batch), len(adapters), sum(waiting.row.length for waiting in batch))
            return answers
        self.statistics.failures += 1
        if len(batch) == 1:
            return [failed.with_traceback(None)]  # which would hold on to tensors
        half = len(batch) // 2
        return self._compute(batch[:half]) + self._compute(batch[half:])
