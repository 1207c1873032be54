"""Adapters that cannot be used: refused by name, without a trace, and not tried again at once."""

import json
import shutil
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_mask import AdapterCache, AdapterRefusedError, MaskConfig, UnknownAdapterError, keep_scores
from tests.serving.fleet import (
    NAMES,
    SECONDS,
    answer,
    ask,
    base,
    in_threads,
    save,
    served_model,
    set_when_waited_for,
    trace,
)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def copy(folder, to):
    shutil.copytree(folder / NAMES[1], to)
    return to


def flipped(folder, to):
    path = copy(folder, to) / TENSORS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(folder, to):
    path = copy(folder, to) / TENSORS
    path.write_bytes(path.read_bytes()[:-20])


def edited(change):
    def write(folder, to):
        path = copy(folder, to) / TENSORS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return write


def said(**fields):
    def write(folder, to):
        path = copy(folder, to) / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")

    return write


def of_another_base(folder, to):
    torch.manual_seed(5)
    bare = base()
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.add_(torch.randn_like(parameter))
    get_peft_model(bare, MaskConfig(task_type="SEQ_CLS", init_weights=False)).save_pretrained(to)


def of_lora(folder, to):
    get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(to)


def of_other_layers(folder, to):
    save(to.parent, [to.name], target_modules=["query", "word_embeddings"])


def without_config(folder, to):
    (copy(folder, to) / CONFIG).unlink()


def config_of(text):
    def write(folder, to):
        (copy(folder, to) / CONFIG).write_text(text, "utf-8")

    return write


def drop_mask(tensors):
    del tensors[next(name for name in tensors if name.endswith("peft_mask_bits"))]


HEAD = "base_model.model.classifier.weight"
DAMAGED = {
    "a flipped bit": (flipped, "its checksum is wrong"),
    "cut short": (cut_short, "is not a whole safetensors file"),
    "another base": (of_another_base, "the base weight is not the one it was trained on"),
    "another method": (of_lora, "it is not a mask, but of type LORA"),
    "another task": (said(task_type="TOKEN_CLS"), "it is for the task TOKEN_CLS, this model for SEQ_CLS"),
    "other layers": (of_other_layers, "it masks .*word_embeddings.*, which this model does not"),
    "another head": (
        edited(lambda tensors: tensors.update({HEAD: torch.zeros(5, 32)})),
        "its head has 5 labels, this model's 3: make the model with the adapter that has the most labels",
    ),
    "another head of this shape": (
        edited(lambda tensors: tensors[HEAD].add_(1)),
        "cannot load 'classifier.weight': it is not what was saved",
    ),
    "no head": (edited(lambda tensors: tensors.pop(HEAD)), "the file has nothing of that name"),
    "a head of NaN": (edited(lambda tensors: tensors[HEAD].fill_(torch.nan)), "96 of its 96 values are NaN"),
    "a mask too few": (edited(drop_mask), "its file holds 12 masks, its configuration speaks of 13"),
    "a tensor of the base": (
        edited(lambda tensors: tensors.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)})),
        "which would change the base model",
    ),
    "no masks": (
        edited(lambda tensors: [tensors.pop(n) for n in [*tensors] if "bits" in n]),
        "its file holds no masks",
    ),
    "trained tokens": (said(trainable_token_indices=[1]), "trained tokens of its own"),
    "modules of its own": (said(modules_to_save=["classifier", "pooler"]), "it has trained .*pooler"),
    "a masked head": (said(head="masked"), "they share a masked head, or train one each"),
    "no configuration": (without_config, r"adapter_config.json' does not exist"),
    "no JSON": (config_of("{"), "is no JSON object"),
    "a list": (config_of("[]"), "is no JSON object"),
    "nonsense": (said(threshold="much"), "threshold must be a finite number"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_refused_adapter_leaves_no_trace_and_harms_no_neighbor(folder, model, expected, tmp_path, what):
    write, message = DAMAGED[what]
    write(folder, tmp_path / "bad")
    places = {name: folder / name for name in NAMES} | {"bad": tmp_path / "bad"}
    cache = AdapterCache(model, places, slots=3, max_bytes=3 * 5000)
    ask(cache, model, NAMES[:2], expected)
    before, memory = trace(model), cache.stats()
    for names in (["bad"], [NAMES[0], "bad"]):
        with (
            pytest.raises(AdapterRefusedError, match="(?s)the adapter 'bad' is refused: .*" + message),
            cache.lease(names),
        ):
            pass
    assert trace(model) == before
    now = cache.stats()
    assert (now.bytes, now.adapters, now.slots, now.leases) == (memory.bytes, 2, 2, 0)
    assert (now.evictions, now.refusals) == (0, 2)  # room is made for what was read and found right
    ask(cache, model, [NAMES[1], NAMES[0], NAMES[2]], expected)


@pytest.mark.parametrize(
    "name",
    ["../task-1", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "task-1\0", "~", "-x", "ä", "x" * 129, "task-1\n"],
)
def test_names_are_checked_before_they_reach_the_file_system(folder, model, name, monkeypatch):
    cache = AdapterCache(model, folder / NAMES[0] / "..")
    monkeypatch.setattr(cache._loads, "locate", lambda name: pytest.fail(f"{name!r} was looked for"))
    with pytest.raises(UnknownAdapterError, match="names are of up to 128 letters"), cache.lease([name]):
        pass
    assert cache.stats().refusals == 1


def test_an_unknown_name_is_said(folder, model):
    before = trace(model)
    cache = AdapterCache(model, folder)
    with pytest.raises(UnknownAdapterError, match=r"there is no adapter 'none': .* has no folder of that name"):
        cache.pin("none")
    with pytest.raises(LookupError), cache.lease(["none", "__base__"]):
        pass
    cache.close()
    assert trace(model) == before


def test_a_refused_adapter_is_not_tried_again_for_some_seconds(folder, model, expected, tmp_path):
    flipped(folder, tmp_path / "bad")
    calls = []

    def source(name):
        calls.append(name)
        return tmp_path / "bad"

    cache = AdapterCache(model, source, refusal_seconds=10)
    now = [100.0]
    cache._flights.clock = lambda: now[0]

    def refused():
        with pytest.raises(AdapterRefusedError, match="checksum"), cache.lease(["bad"]):
            pass
        return len(calls)

    assert [refused(), refused()] == [1, 1]
    now[0] += 9.9
    assert refused() == 1
    now[0] += 0.2
    assert refused() == 2
    shutil.rmtree(tmp_path / "bad")
    copy(folder, tmp_path / "bad")
    assert refused() == 2
    assert cache.refresh("bad") is False  # who has mended it says so
    ask(cache, model, ["bad"], {"bad": expected[NAMES[1]]})


def test_what_is_remembered_of_refusals_is_bounded(folder, model):
    cache = AdapterCache(model, folder)
    for number in range(1100):
        with pytest.raises(UnknownAdapterError), cache.lease([f"n{number}"]):
            pass
    assert len(cache._flights._refused) == 1024
    assert not cache._flights._going_on


def test_an_exception_of_the_loader_reaches_all_who_wait(folder, model, expected, monkeypatch):
    calls, all_wait = [], threading.Event()

    def source(name):
        calls.append(name)
        assert all_wait.wait(SECONDS)
        raise RuntimeError("the shelf is on fire")

    cache = AdapterCache(model, source, refusal_seconds=0)
    set_when_waited_for(monkeypatch, cache, all_wait, 8)
    errors = []

    def client():
        with (
            pytest.raises(AdapterRefusedError, match="'cold' is refused: the shelf is on fire") as found,
            cache.lease(["cold"]),
        ):
            pass
        errors.append(found.value)

    in_threads(*[client] * 8)
    assert calls == ["cold"]
    assert len({id(error) for error in errors}) == 8  # a traceback is one thread's
    assert cache.stats().refusals == 8


def test_who_looks_for_an_adapter_and_is_interrupted_leaves_it_to_the_others(folder, model, expected, monkeypatch):
    calls, both_wait = [], threading.Event()

    def source(name):
        calls.append(name)
        if len(calls) == 1:
            assert both_wait.wait(SECONDS)
            raise KeyboardInterrupt
        return folder / NAMES[2]

    cache = AdapterCache(model, source)
    set_when_waited_for(monkeypatch, cache, both_wait, 2)
    ends = []

    def client():
        try:
            ask(cache, model, ["cold"], {"cold": expected[NAMES[2]]})
            ends.append("answered")
        except KeyboardInterrupt:
            ends.append("interrupted")

    in_threads(client, client)
    assert sorted(ends) == ["answered", "interrupted"]
    assert len(calls) == 2


def test_a_file_larger_than_the_memory_is_not_read(folder, model):
    cache = AdapterCache(model, folder, max_bytes=100)
    with pytest.raises(AdapterRefusedError, match="more than the 100 that it may have"), cache.lease([NAMES[0]]):
        pass


def test_scores_in_a_file_take_no_memory(tmp_path, folder, model, expected):
    trained = get_peft_model(base(), MaskConfig(task_type="SEQ_CLS", target_sparsity=0.2, candidates=None))
    trained.save_pretrained(tmp_path / "bare")
    keep_scores(trained)
    trained.save_pretrained(tmp_path / "scored")
    assert (tmp_path / "scored" / TENSORS).stat().st_size > 2 * (tmp_path / "bare" / TENSORS).stat().st_size
    cache = AdapterCache(model, tmp_path)
    with cache.lease(["scored", "bare"]) as rows:
        one, two = answer(model, rows[:1]), answer(model, rows[1:])
    assert torch.equal(one, two)
    sizes = {version.name: version.coded.nbytes for version in cache._resident}
    assert abs(sizes["scored"] - sizes["bare"]) < 100  # what safetensors says of the format


def test_an_adapter_that_masks_fewer_layers_leaves_the_others_whole(tmp_path, folder, model, expected):
    save(tmp_path, ["few"], target_modules=["query"])
    fewer = served_model(tmp_path, "few")
    with torch.no_grad():
        wanted = fewer(input_ids=torch.arange(14).view(2, 7) + 3).logits
    places = {"few": tmp_path / "few", "full": folder / NAMES[1]}
    cache = AdapterCache(model, places, slots=1)
    for name in ("full", "few", "full"):  # in one slot, one after the other
        ask(cache, model, [name] * 2, {"few": wanted, "full": expected[NAMES[1]]})
