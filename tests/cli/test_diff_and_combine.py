import json
import shutil

import pytest
import torch
from peft import PeftModel

from peft_mask import Masks
from peft_mask.analysis import iou, whole


def test_an_adapter_is_the_same_as_itself_in_either_kind_of_file(place, run):
    thin, bound = place.adapters / "thin", place.adapters / "bound"
    said = run("diff", thin, thin)
    assert (said.code, said.out.splitlines()[-1]) == (0, "The same masks and tensors.")
    said = run("diff", thin, bound, "--base", place.base, "--json")
    assert said.code == 0
    assert said.data["all"]["agreement"] == 1.0


@pytest.mark.parametrize("by", ["kind", "layer", "matrix"])
def test_the_agreement_is_that_of_the_analyses(by, place, run):
    paths = [place.adapters / name for name in ("a", "b")]
    said = run("diff", *paths, "--by", by, "--json")
    assert said.code == 1
    a, b = map(Masks.load, paths)
    assert said.data["all"]["agreement"] == pytest.approx(iou(a, b, whole)["all"])
    if by == "matrix":
        assert {row["matrix"]: row["agreement"] for row in said.data["groups"]} == pytest.approx(iou(a, b))
    assert sum(row["only_in_a"] for row in said.data["groups"]) == sum((a - b).zeros.values())


def test_a_head_alone_makes_a_difference(place, run, tmp_path):
    run("combine", place.adapters / "a", place.adapters / "a", "--how", "union", "--out", tmp_path / "bare")
    said = run("diff", place.adapters / "a", tmp_path / "bare", "--json")
    assert said.code == 1
    assert said.data["all"]["agreement"] == 1.0
    assert said.data["beside"] == {"classifier.bias": "only in A", "classifier.weight": "only in A"}


def test_masks_of_other_modules_or_other_bases_differ_and_are_not_compared(place, talking, run):
    said = run("diff", place.adapters / "a", talking.adapters / "a")
    assert said.code == 1
    assert "They differ: they do not mask the same modules (0 are masked in both)." in said.out
    other = run("diff", place.adapters / "a", place.adapters / "a", "--json").data | {}
    assert other["same"] is True


def test_an_adapter_that_needs_its_base_is_not_compared_without_it(place, refused):
    message = refused("diff", place.adapters / "thin", place.adapters / "bound")
    assert message.endswith("bound' is coded against its base: name it with --base, so that it can be read.")


@pytest.mark.parametrize("how", ["intersection", "union", "majority"])
def test_a_combination_is_that_of_the_masks_and_has_no_head(how, place, run, tmp_path):
    paths = [place.adapters / name for name in ("a", "b", "c")]
    said = run("combine", *paths, "--how", how, "--out", tmp_path / "out")
    assert said.code == 0
    assert "without a head: classifier.bias, classifier.weight stayed behind" in said.out
    assert Masks.load(tmp_path / "out") == Masks.combine([Masks.load(path) for path in paths], [1.0] * 3, how)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] is None


def test_a_combination_with_the_head_of_one_loads_and_computes_with_it(place, run, tmp_path):
    paths = [place.adapters / name for name in ("a", "b")]
    said = run("combine", *paths, "--how", "intersection", "--head", paths[1], "--out", tmp_path / "out", "--json")
    assert said.data["carried"] == ["classifier.bias", "classifier.weight"]
    assert (tmp_path / "out" / "labels.json").read_bytes() == (paths[1] / "labels.json").read_bytes()
    made = PeftModel.from_pretrained(place.load(5), tmp_path / "out")
    alone = PeftModel.from_pretrained(place.load(5), paths[1])
    heads = [model.base_model.model.classifier.modules_to_save["default"].weight for model in (made, alone)]
    assert torch.equal(*heads)
    checksums = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["checksums"]
    assert sorted(checksums["tensors"]) == ["classifier.bias", "classifier.weight"]


def test_a_carried_head_that_is_damaged_later_is_refused(place, run, tmp_path):
    path = place.adapters / "a"
    run("combine", path, place.adapters / "b", "--how", "union", "--head", path, "--out", tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(b"PMSK") - 5] ^= 1  # in what stands before the first mask
    file.write_bytes(data)
    said = run("verify", tmp_path / "out", "--base", place.base)
    assert said.code in (1, 2)
    assert "They belong" not in said.out


def test_votes_count_in_a_majority(place, run, refused, tmp_path):
    paths = [place.adapters / name for name in ("a", "b", "c")]
    run("combine", *paths, "--how", "majority", "--votes", 1, 1, 5, "--out", tmp_path / "out")
    assert Masks.load(tmp_path / "out") == Masks.load(paths[2])
    message = refused("combine", *paths, "--how", "union", "--votes", 1, 1, 5, "--out", tmp_path / "no")
    assert "--votes count in a majority alone" in message
    message = refused("combine", *paths, "--how", "majority", "--votes", 1, "--out", tmp_path / "no")
    assert "--votes: give a vote for each of the 3 adapters, in their order; got 1." in message


def test_what_cannot_be_combined_is_refused_and_leaves_nothing(place, talking, refused, tmp_path):
    a = place.adapters / "a"
    assert "combine needs two adapters or more" in refused("combine", a, "--how", "union", "--out", tmp_path / "no")
    message = refused("combine", a, talking.adapters / "a", "--how", "union", "--out", tmp_path / "no")
    assert "cannot combine masks of different modules. only on the left: ['bert." in message
    message = refused("combine", a, a, "--how", "union", "--head", place.adapters / "c", "--out", tmp_path / "no")
    assert "name one of the adapters that are combined" in message
    assert list(tmp_path.iterdir()) == []


def test_masks_of_another_base_of_the_same_shape_differ(place, run, tmp_path):
    from tests.server.places import KINDS, Place

    class Other(Place):
        def load(self, labels=0):
            model = super().load(labels)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "encoder" in name:
                        weight.mul_(-1)
            return model

    other = Other(tmp_path / "other", KINDS["classify"], names=("a",))
    said = run("diff", place.adapters / "a", other.adapters / "a")
    assert said.code == 1
    assert "they were made for different base weights" in said.out
    shutil.rmtree(tmp_path / "other")
