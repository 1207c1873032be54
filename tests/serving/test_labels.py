"""Adapters with different numbers of labels in one model, and the names of these."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_mask import AdapterCache, AdapterRefusedError
from peft_mask.serving.labels import put
from tests.serving import fleet
from tests.serving.fleet import NAMES, answer
from tests.tiny_models import NUM_LABELS, tiny_config, tiny_model

LABELS = {"two": 2, "three": 3, "seven": 7}
WIDEST = 7
KINDS = {
    "linear": ("bert", "seq_cls"),
    "dense and out_proj": ("roberta", "seq_cls"),
    "norm": ("modernbert", "token_cls"),
    "two modules": ("distilbert", "seq_cls"),
    "no bias": ("llama", "seq_cls"),
    "tokens": ("bert", "token_cls"),
}
NAMES_OF_TWO = ["yes", "nö"]
TENSORS = "adapter_model.safetensors"
WEIGHT, BIAS = (f"base_model.model.classifier.{own}" for own in ("weight", "bias"))


def base(kind="linear", labels=WIDEST):
    """A model whose backbone is the same for every number of labels."""
    family, head = KINDS[kind]
    pattern, config = tiny_model(family, head), tiny_config(family)
    config.num_labels = labels
    model = type(pattern)(config)
    model.base_model.load_state_dict(pattern.base_model.state_dict())
    return model.eval()


def save(root, kind, **fields):
    task = {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS"}[KINDS[kind][1]]
    for seed, (name, labels) in enumerate(LABELS.items()):
        fleet.save(root, [name], seed, base(kind, labels), task_type=task, **fields)
    (root / "two" / "labels.json").write_text(json.dumps(NAMES_OF_TWO), "utf-8")


@pytest.fixture(scope="module", params=KINDS)
def various(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("various")
    save(root, request.param)
    return request.param, root


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    save(root, "linear")
    return root


def served(folder, kind="linear"):
    return fleet.served_model(folder, "seven", base(kind))


def check(logits, names, alone, unused):
    for row, name in enumerate(names):
        count = LABELS[name]
        torch.testing.assert_close(logits[row][..., :count], alone[name][row % 2])
        assert (logits[row][..., count:] == unused).all()


def test_adapters_with_fewer_labels_than_the_model_answer_as_each_alone(various):
    kind, folder = various
    alone = {name: fleet.alone(folder, name, base(kind, labels)) for name, labels in LABELS.items()}
    first = torch.stack([logits[..., :2] for logits in alone.values()])
    assert min((first[i] - first[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05  # else it could not fail
    model = served(folder, kind)
    unused = 0 if kind == "no bias" else torch.finfo(torch.float32).min
    for slots in (3, 1):
        cache = AdapterCache(model, folder, slots=slots)
        for names in ([*LABELS, *LABELS],) if slots == 3 else (["seven"], ["two"], ["three"], ["seven"], ["two"]):
            with cache.lease(names) as rows:
                logits = answer(model, rows)
            check(logits, names, alone, unused)
            if unused:
                for row, name in zip(logits.softmax(-1), names, strict=True):
                    assert (row[..., LABELS[name] :] == 0).all()
                    torch.testing.assert_close(row[..., : LABELS[name]].sum(-1), torch.ones(row.shape[:-1]))
        cache.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_of_labels_that_an_adapter_does_not_have_is_finite_and_its_share_0(dtype):
    bias = torch.zeros(5, dtype=dtype)
    put(bias, torch.tensor([1.0, 2.0]))
    assert bias.isfinite().all()
    assert (bias.softmax(0)[2:] == 0).all()
    weight = torch.ones(5, 3, dtype=dtype)
    put(weight, torch.full((2, 3), 4.0))
    assert weight.sum(1).tolist() == [12, 12, 0, 0, 0]


def test_a_lease_says_of_each_row_which_adapter_it_is_and_what_its_labels_are(shelf):
    cache = AdapterCache(served(shelf), shelf)
    with cache.lease(["two", "__base__", "seven", "two"]) as rows:
        two, none, seven, again = rows.adapters
    assert (two.name, two.labels, two.num_labels) == ("two", tuple(NAMES_OF_TWO), 2)
    assert (seven.name, seven.labels, seven.num_labels) == ("seven", None, 7)
    assert again == two
    assert none is None
    assert two.digest != seven.digest
    with cache.lease(["two"]) as rows:  # from its slot
        assert rows.adapters == (two,)


def test_names_of_labels_count_as_memory(shelf, tmp_path):
    shutil.copytree(shelf / "two", tmp_path / "two")
    cache = AdapterCache(served(shelf), tmp_path)
    long = "x" * 1000
    (tmp_path / "two" / "labels.json").write_text(json.dumps(["a", long]))
    cache.pin("two")
    assert cache.stats().bytes > (tmp_path / "two" / TENSORS).stat().st_size + 1000


def test_other_names_are_another_version(shelf, tmp_path):
    shutil.copytree(shelf / "two", tmp_path / "two")
    cache = AdapterCache(served(shelf), tmp_path)
    with cache.lease(["two"]) as old:
        assert cache.refresh("two") is False
        (tmp_path / "two" / "labels.json").write_text('["no", "yes"]')
        assert cache.refresh("two") is True
        with cache.lease(["two"]) as new:
            assert [rows.adapters[0].labels for rows in (old, new)] == [tuple(NAMES_OF_TWO), ("no", "yes")]
            assert old.adapters[0].digest != new.adapters[0].digest
            assert torch.equal(*(answer(cache._rooms.slots._model, rows) for rows in (old, new)))
    (tmp_path / "two" / "labels.json").unlink()
    assert cache.refresh("two") is True
    with cache.lease(["two"]) as rows:
        assert rows.adapters[0].labels is None


def test_names_that_are_written_while_an_adapter_is_read_are_those_of_its_version(shelf, tmp_path, monkeypatch):
    shutil.copytree(shelf / "two", tmp_path / "two")
    names, read = tmp_path / "two" / "labels.json", Path.read_bytes

    def written_meanwhile(path):
        if path.name == TENSORS:
            names.write_text('["new", "names"]')
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", written_meanwhile)
    with AdapterCache(served(shelf), tmp_path).lease(["two"]) as rows:
        assert rows.adapters[0].labels == ("new", "names")


def edited(change):
    def write(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return write


def named(text):
    return lambda folder: (folder / "labels.json").write_text(text, "utf-8")


def folder_in_its_place(folder):
    (folder / "labels.json").unlink()
    (folder / "labels.json").mkdir()


WRONG = {
    "fewer rows in the weight alone": (
        edited(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:1]})),
        r"cannot load 'classifier.bias': expected the shape \(1,\), the file has \(2,\)",
    ),
    "fewer rows in the bias alone": (
        edited(lambda tensors: tensors.update({BIAS: tensors[BIAS][:1]})),
        r"cannot load 'classifier.bias': expected the shape \(2,\), the file has \(1,\)",
    ),
    "fewer rows than were saved": (
        edited(lambda tensors: tensors.update({name: tensors[name][:1] for name in (WEIGHT, BIAS)})),
        "cannot load 'classifier.bias': it is not what was saved",
    ),
    "no rows": (
        edited(lambda tensors: tensors.update({name: tensors[name][:0] for name in (WEIGHT, BIAS)})),
        r"cannot load 'classifier.weight': expected the shape \(7, 32\), the file has \(0, 32\)",
    ),
    "fewer columns": (
        edited(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:, :9].clone()})),
        r"cannot load 'classifier.weight': expected the shape \(2, 32\), the file has \(2, 9\)",
    ),
    "a row of numbers": (
        edited(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][0].clone()})),
        r"cannot load 'classifier.weight': expected the shape \(7, 32\), the file has \(32,\)",
    ),
    "another value": (edited(lambda tensors: tensors[WEIGHT].add_(1)), "'classifier.weight': it is not what was saved"),
    "NaN": (edited(lambda tensors: tensors[BIAS].fill_(torch.nan)), "2 of its 2 values are NaN"),
    "more labels": (
        edited(lambda tensors: tensors.update({WEIGHT: torch.zeros(9, 32), BIAS: torch.zeros(9)})),
        "its head has 9 labels, this model's 7: make the model with the adapter that has the most labels",
    ),
    "names cut short": (named('["yes", "n'), r"labels.json' is no JSON .*write the names of the labels as a list"),
    "names in no encoding": (
        lambda folder: (folder / "labels.json").write_bytes(b'["\xff", "b"]'),
        r"labels.json' is no JSON",
    ),
    "a number for a name": (named('["yes", 1]'), "labels.json' must be a list of strings"),
    "names by number": (named('{"0": "yes", "1": "no"}'), "labels.json' must be a list of strings"),
    "a name twice": (named('["yes", "yes"]'), r"labels.json' names labels twice: \['yes'\]"),
    "half a character": (named('["yes", "\\ud83d"]'), "labels.json' has a name that is no text"),
    "a name too few": (named('["yes"]'), "its 'labels.json' names 1 labels, its head has 2"),
    "a name too many": (named('["yes", "no", "neither"]'), "its 'labels.json' names 3 labels, its head has 2"),
    "nested without end": (named("[" * 100_000), "labels.json' is no JSON"),
    "names of a megabyte": (
        named(json.dumps(["x" * (1 << 20)])),
        "labels.json' has 1,048,580 bytes, more than the 1,048,576 that it may have",
    ),
    "a folder of that name": (folder_in_its_place, "labels.json' is no file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_head_or_wrong_names_are_refused_and_leave_no_trace(shelf, tmp_path, what):
    write, message = WRONG[what]
    shutil.copytree(shelf / "two", tmp_path / "bad")
    write(tmp_path / "bad")
    model = served(shelf)
    cache = AdapterCache(model, {"bad": tmp_path / "bad", "two": shelf / "two"})
    before = fleet.trace(model)
    with (
        pytest.raises(AdapterRefusedError, match="(?s)the adapter 'bad' is refused: .*" + message),
        cache.lease(["two", "bad"]),
    ):
        pass
    assert fleet.trace(model) == before
    assert (cache.stats().leases, cache.stats().slots) == (0, 0)


def test_a_layer_of_the_head_that_is_not_for_labels_must_be_whole(tmp_path):
    save(tmp_path, "two modules")
    head = "base_model.model.pre_classifier"

    def shorten(tensors):
        tensors |= {f"{head}.{own}": tensors[f"{head}.{own}"][:2] for own in ("weight", "bias")}

    edited(shorten)(tmp_path / "three")
    message = r"cannot load 'pre_classifier.\w+': expected the shape \(32.*\), the file has \(2"
    with pytest.raises(AdapterRefusedError, match=message):
        AdapterCache(served(tmp_path, "two modules"), tmp_path).pin("three")


def test_as_many_labels_as_the_head_is_wide_are_those_of_its_last_layer(tmp_path):
    kind, width = "dense and out_proj", 32
    fleet.save(tmp_path, ["wide"], 0, base(kind, width))
    fleet.save(tmp_path, ["three"], 1, base(kind, 3))
    cache = AdapterCache(model := fleet.served_model(tmp_path, "wide", base(kind, width)), tmp_path)
    with cache.lease(["three", "wide"]) as rows:
        logits = answer(model, rows)
    assert [own.num_labels for own in rows.adapters] == [3, width]
    torch.testing.assert_close(logits[0, :3], fleet.alone(tmp_path, "three", base(kind, 3))[0])


def test_a_head_of_more_labels_is_refused_by_a_model_of_fewer(shelf):
    model = fleet.served_model(shelf, "three", base(labels=3))
    cache = AdapterCache(model, shelf)
    with pytest.raises(AdapterRefusedError, match="'seven' is refused: its head has 7 labels, this model's 3"):
        cache.pin("seven")
    cache.pin("two")


def test_adapters_that_share_a_masked_head_have_the_same_number_of_labels(tmp_path):
    save(tmp_path, "linear", head="masked")
    fleet.save(tmp_path, ["other"], 9, base(), head="masked")
    cache = AdapterCache(served(tmp_path), tmp_path)
    (tmp_path / "seven" / "labels.json").write_text(json.dumps(list("abcdefg")))
    with cache.lease(["seven", "other"]) as rows:
        assert [own.num_labels for own in rows.adapters] == [7, 7]
        assert [own.labels for own in rows.adapters] == [tuple("abcdefg"), None]
    message = "'three' is refused: its masked head has 3 labels, this model's 7: .* train all with the same num_labels"
    with pytest.raises(AdapterRefusedError, match=message):
        cache.pin("three")


def test_a_model_without_labels_says_so(tmp_path):
    bare = [tiny_model("bert", "base") for _ in range(3)]
    fleet.save(tmp_path, NAMES[:2], bare=bare[0], task_type="FEATURE_EXTRACTION")
    (tmp_path / NAMES[1] / "labels.json").write_text('["topic"]')
    cache = AdapterCache(fleet.served_model(tmp_path, bare=bare[1]), tmp_path)
    with cache.lease(NAMES[:2]) as rows:
        assert [own.num_labels for own in rows.adapters] == [None, None]
        assert [own.labels for own in rows.adapters] == [None, ("topic",)]


def test_adapters_of_one_number_of_labels_have_that_many(folder, model):
    with AdapterCache(model, folder).lease(NAMES) as rows:
        assert [own.name for own in rows.adapters] == NAMES
        assert {own.num_labels for own in rows.adapters} == {NUM_LABELS}
