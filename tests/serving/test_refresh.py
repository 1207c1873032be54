"""New versions of adapters: each answer is wholly of one version, and none after the turn is of the old one."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from peft_mask import AdapterCache, AdapterRefusedError
from peft_mask.serving.coded import read_adapter
from tests.serving.fleet import NAMES, SECONDS, alone, answer, ask, check_rows, in_threads, trace


@pytest.fixture
def shelf(folder, tmp_path):
    """A folder whose adapter "x" can be exchanged."""

    def put(name, to="x"):
        shutil.rmtree(tmp_path / to, ignore_errors=True)
        shutil.copytree(folder / name, tmp_path / to)

    put(NAMES[1])
    put(NAMES[3], "y")
    return tmp_path, put


def test_a_new_version_is_for_leases_from_now_on(shelf, model, expected):
    place, put = shelf
    cache = AdapterCache(model, place)
    assert cache.refresh("x") is False  # not here
    with cache.lease(["x", "y"]) as old:
        assert cache.refresh("x") is False  # the same
        put(NAMES[2])
        ask(cache, model, ["x"], {"x": expected[NAMES[1]]})  # nobody has said so
        assert cache.refresh("x") is True
        ask(cache, model, ["x", "y"], {"x": expected[NAMES[2]], "y": expected[NAMES[3]]})
        check_rows(answer(model, old), ["x", "y"], {"x": expected[NAMES[1]], "y": expected[NAMES[3]]})
        assert (cache.stats().adapters, cache.stats().slots) == (3, 3)
    assert (cache.stats().adapters, cache.stats().slots) == (2, 2)  # the old one went with its last lease
    assert cache.stats().evictions == 0


def test_a_version_that_is_being_read_while_a_new_one_comes_does_not_stay(shelf, model, expected, monkeypatch):
    place, put = shelf
    cache = AdapterCache(model, place)
    has_read, go_on = threading.Event(), threading.Event()

    def reading(*args):
        found = read_adapter(*args)
        if not has_read.is_set():
            has_read.set()
            assert go_on.wait(SECONDS)
        return found

    monkeypatch.setattr("peft_mask.serving.cache.read_adapter", reading)
    with ThreadPoolExecutor(2) as pool:
        leasing = pool.submit(ask, cache, model, ["x"], {"x": expected[NAMES[1]]})
        assert has_read.wait(SECONDS)
        put(NAMES[2])
        refreshing = pool.submit(cache.refresh, "x")
        wait([refreshing], 0.2)  # it waits for its turn
        go_on.set()
        leasing.result(SECONDS)
        assert refreshing.result(SECONDS) is True
    ask(cache, model, ["x"], {"x": expected[NAMES[2]]})


def test_a_version_that_comes_back_while_it_is_leased_is_the_same_one(shelf, model, expected):
    place, put = shelf
    cache = AdapterCache(model, place)
    with cache.lease(["x"]):
        for name in (NAMES[2], NAMES[1], NAMES[2], NAMES[1]):
            put(name)
            assert cache.refresh("x")
            ask(cache, model, ["x", "x"], {"x": expected[name]})
    ask(cache, model, ["x"], {"x": expected[NAMES[1]]})
    assert cache.stats().adapters == 1
    assert cache.stats().bytes == sum(version.coded.nbytes for version in cache._resident)


@pytest.mark.parametrize("pinned", [False, True])
def test_under_load_each_answer_is_wholly_old_or_wholly_new(shelf, model, expected, pinned):
    place, put = shelf
    cache = AdapterCache(model, place, slots=3)
    if pinned:
        cache.pin("x")
    versions = [expected[NAMES[1]], expected[NAMES[2]]]
    turned, stop, wrong, seen = threading.Event(), threading.Event(), [], set()

    def client():
        while not stop.is_set():
            after = turned.is_set()
            with cache.lease(["x", "y"]) as rows:
                row = answer(model, rows)[0]
            which = [torch.allclose(row, logits[0], atol=1e-5) for logits in versions]
            seen.add(which.index(True) if any(which) else None)
            if sum(which) != 1 or (after and not which[1]):
                wrong.append((after, which))

    def turn():
        try:
            for _ in range(15):
                ask(cache, model, ["y"], {"y": expected[NAMES[3]]})
            put(NAMES[2])
            assert cache.refresh("x")
            turned.set()
            for _ in range(15):
                ask(cache, model, ["x"], {"x": versions[1]})
        finally:
            stop.set()

    in_threads(client, client, turn)
    assert not wrong
    assert seen == {0, 1}
    assert (cache.stats().adapters, cache.stats().leases) == (2, 0)


def test_a_forward_pass_that_is_under_way_keeps_its_version_in_all_layers_and_in_the_head(shelf, model, expected):
    place, put = shelf
    cache = AdapterCache(model, place, slots=2)

    def exchange(*_):
        if not done:
            done.append(True)
            put(NAMES[2])
            in_threads(lambda: cache.refresh("x"))
            in_threads(lambda: ask(cache, model, ["x"], {"x": expected[NAMES[2]]}))

    done = []
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
    handle = layer.register_forward_pre_hook(exchange)
    ask(cache, model, ["x", "x"], {"x": expected[NAMES[1]]})
    handle.remove()
    assert done
    ask(cache, model, ["x", "x"], {"x": expected[NAMES[2]]})


def test_a_new_version_that_is_refused_leaves_the_old_one_in_force(shelf, model, expected):
    place, _ = shelf
    cache = AdapterCache(model, place)
    ask(cache, model, ["x"], {"x": expected[NAMES[1]]})
    before = trace(model)
    path = place / "x" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterRefusedError, match=r"'x' is refused: .* not a whole safetensors file"):
        cache.refresh("x")
    assert trace(model) == before
    ask(cache, model, ["x"], {"x": expected[NAMES[1]]})


def test_a_refresh_in_full_memory_makes_room_like_any_load(shelf, model, expected):
    place, put = shelf
    size = (place / "x" / "adapter_model.safetensors").stat().st_size
    cache = AdapterCache(model, place, max_bytes=size + 50)
    ask(cache, model, ["x"], {"x": expected[NAMES[1]]})
    put(NAMES[2])
    assert cache.refresh("x")
    assert cache.stats().adapters == 1
    ask(cache, model, ["x"], {"x": expected[NAMES[2]]})
    cache.timeout = 0.01
    put(NAMES[4])
    with cache.lease(["x"]), pytest.raises(TimeoutError, match="memory is leased or pinned"):
        cache.refresh("x")
    ask(cache, model, ["x"], {"x": expected[NAMES[2]]})
    assert cache.refresh("x")
    assert (alone(place, "x") - expected[NAMES[2]]).abs().max() > 0.01
    ask(cache, model, ["x"], {"x": expected[NAMES[4]]})
