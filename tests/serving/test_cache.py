"""Hundreds of adapters of one base: each row is its adapter's, whoever comes and goes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_mask import AdapterCache, MaskLayer, NoRoomError
from tests.serving.fleet import (
    IDS,
    NAMES,
    SECONDS,
    alone,
    answer,
    ask,
    check_rows,
    in_threads,
    largest,
    save,
    served_model,
    set_when_waited_for,
    trace,
    without_head,
)


def test_rows_of_mixed_traffic_are_those_of_their_adapters(folder, model, expected):
    with AdapterCache(model, folder).lease(NAMES) as rows:
        assert len(set(rows)) == len(NAMES)
        masks = without_head(model, rows)
        check_rows(answer(model, rows), NAMES, expected)
    assert min((a - b).abs().max() for a, b in zip(masks[2:], masks, strict=False)) > 1e-3  # not by their heads alone


def test_rows_of_no_adapter_are_the_bases(folder, model, expected):
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=IDS).logits
    cache = AdapterCache(model, folder)
    ask(cache, model, [NAMES[1], "__base__", "__base__", NAMES[2]], {**expected, "__base__": bare})
    with cache.lease(["__base__"]) as rows:
        assert rows == ["__base__"]
    assert cache.stats().adapters == 2


def test_what_is_leased_is_not_evicted_while_others_need_its_room(folder, model, expected):
    cache = AdapterCache(model, folder, max_bytes=2 * largest(folder), slots=2)
    inside, others_are_done = threading.Event(), threading.Event()
    thread = []

    def between_layers(*_):
        if threading.get_ident() in thread:
            inside.set()
            others_are_done.wait(SECONDS)

    def forward():
        thread.append(threading.get_ident())
        ask(cache, model, [NAMES[0]] * 2, expected)

    handle = [m for m in model.modules() if isinstance(m, MaskLayer)][5].register_forward_pre_hook(between_layers)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(forward)
        assert inside.wait(SECONDS)
        for name in NAMES[1:]:
            ask(cache, model, [name], expected)
            assert cache.stats().slots == 2
        with pytest.raises(ValueError, match=f"cannot evict '{NAMES[0]}': it is leased 1 times"):
            cache.evict(NAMES[0])
        others_are_done.set()
        call.result(SECONDS)
    handle.remove()
    assert cache.stats().evictions == len(NAMES) - 2


def when_waiting(cache, monkeypatch, why):
    """Return what is set once a thread waits for this reason; it holds the lock until it does."""
    begun, wait_for = threading.Event(), cache._turns.wait_for

    def waiting(condition, deadline, reason):
        if why in reason and not condition():
            begun.set()
        wait_for(condition, deadline, reason)

    monkeypatch.setattr(cache._turns, "wait_for", waiting)
    return begun


def test_who_finds_no_slot_waits_for_a_bounded_time(folder, model, expected):
    cache = AdapterCache(model, folder, slots=1)
    with cache.lease([NAMES[0]]):
        with pytest.raises(NoRoomError, match="all slots are leased or pinned"), cache.lease([NAMES[1]], timeout=0.01):
            pass
        ask(cache, model, [NAMES[0]], expected)  # who was asked to leave may be leased again, as nobody waits
        assert cache.stats().hits == 1
    ask(cache, model, [NAMES[1]], expected)
    assert cache.stats().leases == 0


def test_who_waits_for_a_slot_is_not_passed_by_those_who_lease_in_turn(folder, model, expected, monkeypatch):
    cache = AdapterCache(model, folder, slots=1)
    asked = when_waiting(cache, monkeypatch, "all slots")
    behind = when_waiting(cache, monkeypatch, "others bring")
    order = []

    def lease(name):
        with cache.lease([name]) as rows:
            order.append(name)
            check_rows(answer(model, rows), [name], expected)

    with ThreadPoolExecutor(2) as pool:
        with cache.lease([NAMES[0]]):
            first = pool.submit(lease, NAMES[1])
            assert asked.wait(SECONDS)
            second = pool.submit(lease, NAMES[0])  # is in the slot, and yet not to be had
            assert behind.wait(SECONDS)
            assert order == []
        first.result(SECONDS), second.result(SECONDS)
    assert order == [NAMES[1], NAMES[0]]


def test_memory_that_is_leased_is_waited_for(folder, model, expected, monkeypatch):
    cache = AdapterCache(model, folder, slots=4, max_bytes=2 * largest(folder))
    waits = when_waiting(cache, monkeypatch, "memory")
    with ThreadPoolExecutor(1) as pool:
        with cache.lease(NAMES[:2]):
            waiting = pool.submit(ask, cache, model, [NAMES[2]], expected)
            assert waits.wait(SECONDS)
            assert cache.stats().adapters == 2
        waiting.result(SECONDS)
    with pytest.raises(ValueError, match="the adapters of one lease take more than the"), cache.lease(NAMES[:3]):
        pass
    assert cache.stats().leases == 0


def test_a_lease_of_more_adapters_than_slots_is_refused(folder, model):
    cache = AdapterCache(model, folder, slots=2)
    with pytest.raises(ValueError, match="a lease of 3 adapters cannot be had with 2 slots"), cache.lease(NAMES[:3]):
        pass
    cache.pin(NAMES[0])
    with (
        pytest.raises(ValueError, match="a lease of 2 adapters cannot be had with 2 slots, of which 1 are pinned"),
        cache.lease(NAMES[1:3]),
    ):
        pass
    assert cache.stats().loads == 1
    for wrong in (NAMES[0], [1], None):
        with pytest.raises(TypeError, match="a list with a name for each row"):
            cache.lease(wrong)


def test_fifty_threads_that_ask_for_one_adapter_load_it_once(folder, model, expected, monkeypatch):
    calls = []
    all_wait = threading.Event()

    def source(name):
        calls.append(name)
        all_wait.wait(SECONDS)
        return folder / name

    cache = AdapterCache(model, source)
    set_when_waited_for(monkeypatch, cache, all_wait, 50)
    in_threads(*[lambda: ask(cache, model, [NAMES[3]], expected)] * 50)
    assert all_wait.is_set()
    assert calls == [NAMES[3]]
    stats = cache.stats()
    assert (stats.loads, stats.fills, stats.misses, stats.adapters) == (1, 1, 50, 1)


def test_a_closed_cache_leaves_nothing_in_the_model(folder, model, expected, tmp_path):
    before = trace(model)
    cache = AdapterCache(model, folder)
    ask(cache, model, NAMES, expected)
    model.save_pretrained(tmp_path)  # an adapter of the user's, beside slots
    saved = [(place / "adapter_model.safetensors").read_bytes() for place in (tmp_path / "own", folder / NAMES[0])]
    assert saved[0] == saved[1]
    with pytest.raises(ValueError, match="this model has a cache already"):
        AdapterCache(model, folder)
    with cache.lease(NAMES[:2]), pytest.raises(ValueError, match=r"cannot close the cache: .* are leased"):
        cache.close()
    cache.close()
    assert trace(model) == before
    with pytest.raises(ValueError, match="the cache is closed"), cache.lease(NAMES[:1]):
        pass
    ask(AdapterCache(model, folder), model, NAMES[:2], expected)


def test_who_waits_while_a_cache_is_closed_brings_nothing_in(folder, model, expected):
    before = trace(model)
    looked_for, go_on = threading.Event(), threading.Event()

    def source(name):
        looked_for.set()
        assert go_on.wait(SECONDS)
        return folder / name

    cache = AdapterCache(model, source)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, cache, model, NAMES[:1], expected)
        assert looked_for.wait(SECONDS)
        cache.close()
        go_on.set()
        with pytest.raises(ValueError, match="the cache is closed"):
            waiting.result(SECONDS)
    assert trace(model) == before


def test_forward_passes_go_on_while_another_slot_is_filled(folder, model, expected, monkeypatch):
    cache = AdapterCache(model, folder)
    ask(cache, model, NAMES[:2], expected)
    half, go_on = threading.Event(), threading.Event()
    layer = [m for m in model.modules() if isinstance(m, MaskLayer)][6]
    hold = layer.hold_record

    def paused(*args):
        half.set()
        assert go_on.wait(SECONDS)
        hold(*args)

    monkeypatch.setattr(layer, "hold_record", paused)
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(ask, cache, model, [NAMES[2]], expected)
        assert half.wait(SECONDS)
        for _ in range(3):
            ask(cache, model, [NAMES[1], NAMES[0]], expected)  # from the slots, past who brings one in
        assert cache._at_once([NAMES[2]]) is None  # nobody gets half of it
        go_on.set()
        filling.result(SECONDS)


def test_a_fill_that_is_interrupted_leaves_the_slot_empty(folder, model, expected, monkeypatch):
    cache = AdapterCache(model, folder)
    ask(cache, model, NAMES[:1], expected)
    before = trace(model)
    layer = [m for m in model.modules() if isinstance(m, MaskLayer)][6]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "hold_record", interrupted)
        with pytest.raises(KeyboardInterrupt), cache.lease([NAMES[1]]):
            pass
    now = trace(model)
    assert {key: now[key] for key in ("masks", "kept", "configurations")} == {
        key: before[key] for key in ("masks", "kept", "configurations")
    }
    assert (cache.stats().leases, cache.stats().slots) == (0, 1)
    ask(cache, model, NAMES[:3], expected)


@pytest.mark.parametrize("kind", ["portable=False", "masked embeddings", "inference mode"])
def test_other_kinds_of_files_and_callers(tmp_path, kind):
    fields = {
        "portable=False": {"portable": False},
        "masked embeddings": {"target_modules": ["query", "word_embeddings"]},
    }
    save(tmp_path, NAMES[:3], **fields.get(kind, {}))
    expected = {name: alone(tmp_path, name) for name in NAMES[:3]}
    assert (expected[NAMES[1]] - expected[NAMES[2]]).abs().max() > 0.01
    model = served_model(tmp_path)
    cache = AdapterCache(model, tmp_path, slots=2)
    with torch.inference_mode(kind == "inference mode"):
        for names in ([NAMES[0]] * 2, [NAMES[1]] * 2, NAMES[:2], NAMES[1:3]):
            ask(cache, model, names, expected)
    ask(cache, model, NAMES[1:3], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, folder: AdapterCache(model.get_base_model(), folder), "needs a PEFT model, got a Bert"),
        (lambda model, folder: AdapterCache(model, folder, slots=0), "slots must be 1 at least, got 0"),
        (lambda model, folder: AdapterCache(model, folder, max_bytes="2 apples"), "like '2GB' or 500_000_000"),
        (lambda model, folder: AdapterCache(model, folder, max_bytes=0), "like '2GB' or 500_000_000"),
        (lambda model, folder: AdapterCache(model, folder / "none"), "there is no folder"),
        (lambda model, folder: AdapterCache(model, 7), "a folder, a mapping or a callable, got a int"),
        (lambda model, folder: (model.merge_adapter(), AdapterCache(model, folder)), "call unmerge_adapter first"),
        (
            lambda model, folder: (model.load_adapter(folder / NAMES[1], "slot:3"), AdapterCache(model, folder)),
            "named as",
        ),
    ],
)
def test_what_a_cache_cannot_be_made_of(folder, model, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(model, folder)
