"""Leases in tasks of asyncio: they do not block the loop, and a cancelled task gives back what it has or will have."""

import asyncio
import threading

import pytest
import torch

from peft_mask import AdapterCache, AdapterRefusedError
from tests.serving.fleet import NAMES, SECONDS, answer, ask, check_rows


@pytest.fixture
def gate(folder):
    """A source that lets nobody through before it is opened, and what is set once somebody waits there."""
    come, opened = threading.Event(), threading.Event()

    def source(name):
        come.set()
        assert opened.wait(SECONDS)
        return folder / name

    return source, come, opened


async def until(event):
    await asyncio.get_running_loop().run_in_executor(None, event.wait, SECONDS)
    assert event.is_set()


def leased(cache):
    return cache.stats().leases


def test_tasks_lease_while_others_compute(folder, model, expected):
    cache = AdapterCache(model, folder, slots=3)

    async def client(name):
        async with cache.lease([name, NAMES[0]]) as rows:
            logits = await asyncio.to_thread(answer, model, rows)
        check_rows(logits, [name, NAMES[0]], expected)

    async def main():
        await asyncio.gather(*[client(name) for name in NAMES[1:] * 2])

    asyncio.run(main())
    assert leased(cache) == 0
    cache.close()


def test_a_task_that_is_cancelled_within_its_lease_gives_it_back(folder, model):
    cache = AdapterCache(model, folder)

    async def main():
        inside = asyncio.Event()

        async def client():
            async with cache.lease(NAMES[:2]):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(client())
        await inside.wait()
        assert leased(cache) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert leased(cache) == 0


def test_a_task_that_is_cancelled_while_it_waits_gives_back_what_comes_later(folder, model, expected, gate):
    source, come, opened = gate
    cache = AdapterCache(model, source)

    async def main():
        async def client():
            async with cache.lease([NAMES[1]]):
                pytest.fail("the task was cancelled before")

        task = asyncio.create_task(client())
        await until(come)  # the loop runs meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        opened.set()
        await asyncio.to_thread(ask, cache, model, [NAMES[1]], expected)  # the same load

    asyncio.run(main())
    cache._executor.shutdown()
    assert leased(cache) == 0
    assert cache.stats().loads == 1
    assert cache.evict(NAMES[1])


def test_a_task_that_is_cancelled_as_its_lease_comes_gives_it_back(folder, model, gate):
    source, come, opened = gate
    cache = AdapterCache(model, source)

    async def main():
        async def client():
            async with cache.lease([NAMES[1]]):
                await asyncio.Event().wait()

        task = asyncio.create_task(client())
        await until(come)
        opened.set()
        cache._executor.submit(lambda: None)
        cache._executor.shutdown()  # the lease is there, and the loop does not know yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cache.stats().fills == 1
    assert leased(cache) == 0


def test_what_is_raised_while_a_task_waits_reaches_it(folder, model):
    cache = AdapterCache(model, folder)

    async def main():
        with pytest.raises(AdapterRefusedError, match="there is no adapter 'none'"):
            async with cache.lease(["none"]):
                pass

    asyncio.run(main())
    assert leased(cache) == 0


def test_a_lease_is_given_back_when_the_call_raises(folder, model):
    cache = AdapterCache(model, folder)
    with pytest.raises(RuntimeError, match="of the call"), cache.lease(NAMES[:2]), torch.no_grad():
        raise RuntimeError("of the call")
    assert leased(cache) == 0
