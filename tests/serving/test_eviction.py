"""Who makes way for whom when memory or slots are short."""

import random

import pytest

from peft_mask import AdapterCache
from peft_mask.serving import cache as cache_module
from tests.serving.fleet import NAMES, ask, in_threads, largest, tensors_alive, trace


def test_a_cache_smaller_than_the_working_set_gives_no_wrong_row(folder, model, expected, monkeypatch):
    limit = 3 * largest(folder)
    cache = AdapterCache(model, folder, max_bytes=limit, slots=2)
    held, most = [], []
    read = cache_module.read_adapter

    def counted(*args):
        held.append(True)
        found = read(*args)
        most.append(cache.stats().bytes + len(held) * largest(folder))  # with all that is being read
        held.pop()
        return found

    monkeypatch.setattr(cache_module, "read_adapter", counted)

    def client(seed):
        draw = random.Random(seed)
        for _ in range(12):
            names = draw.choices(NAMES, k=1) * 2 + draw.choices(NAMES, k=1)
            ask(cache, model, names, expected)
            most.append(cache.stats().bytes)

    in_threads(*[lambda seed=seed: client(seed) for seed in range(6)])
    stats = cache.stats()
    assert max(most) <= limit + largest(folder)
    assert stats.bytes <= limit
    assert stats.loads > len(NAMES)  # it was smaller
    assert stats.evictions == stats.loads - stats.adapters
    assert (stats.leases, stats.slots, stats.adapters) == (0, 2, 3)


def test_what_a_lease_finds_in_memory_does_not_make_way_for_what_it_reads(folder, model, expected):
    cache = AdapterCache(model, folder, slots=2, max_bytes=2 * largest(folder))
    for name in NAMES[:2]:
        ask(cache, model, [name], expected)
    ask(cache, model, [NAMES[2], NAMES[0]], expected)  # the second is the one least recently used
    assert cache.stats().loads == 3


def test_pinned_adapters_stay(folder, model, expected):
    cache = AdapterCache(model, folder, slots=2, max_bytes=2 * largest(folder))
    cache.pin(NAMES[0])
    for name in NAMES[1:]:  # the pinned one is the least recently used all the time
        ask(cache, model, [name], expected)
    hits = cache.stats().hits
    ask(cache, model, [NAMES[0]], expected)
    assert (cache.stats().loads, cache.stats().hits) == (len(NAMES), hits + 1)
    with pytest.raises(ValueError, match=f"cannot evict '{NAMES[0]}': it is pinned: call unpin first"):
        cache.evict(NAMES[0])
    cache.unpin(NAMES[0])
    assert cache.evict(NAMES[0])
    assert not cache.evict(NAMES[0])
    cache.pin(NAMES[0])
    cache.pin(NAMES[1])
    with pytest.raises(ValueError, match="cannot be had with 2 slots"):
        cache.pin(NAMES[2])


@pytest.mark.slow
def test_memory_and_modules_are_the_same_after_many_loads_and_evictions(folder, model, expected):
    cache = AdapterCache(model, folder, max_bytes=2 * largest(folder), slots=2)

    def once_round():
        for name in NAMES:
            ask(cache, model, [name], expected)

    once_round()
    before, alive = (len(list(model.modules())), trace(model)["modules"]), tensors_alive()
    while cache.stats().evictions < 200:
        once_round()
    assert (len(list(model.modules())), trace(model)["modules"]) == before
    assert all(now <= then for now, then in zip(tensors_alive(), alive, strict=True))  # others' may have gone meanwhile
    assert cache.stats().loads > 200
