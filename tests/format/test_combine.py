"""Adapters made of adapters: weighted votes in a model and of `Masks`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, Masks
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model

FIELDS = {"target_sparsity": 0.3, "candidates": None, "init_weights": False}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def three_adapters(targets=(("0", "2"),) * 3):
    model = get_peft_model(mlp(), MaskConfig(target_modules=list(targets[0]), seed=1, **FIELDS), adapter_name="one")
    model.add_adapter("two", MaskConfig(target_modules=list(targets[1]), seed=2, **FIELDS))
    model.add_adapter("three", MaskConfig(target_modules=list(targets[2]), seed=3, **FIELDS))
    return model


def masks(model, adapter):
    return {
        name: module.mask(adapter)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, MaskLayer) and adapter in module.available_adapters
    }


EXPECTED = {
    "intersection": lambda a, b, c: a & b & c,
    "union": lambda a, b, c: a | b | c,
    "majority": lambda a, b, c: a | (b & c),  # the first has half of the votes
}


@pytest.mark.parametrize("combination_type", EXPECTED)
def test_votes_in_a_model_and_of_masks_are_the_same(combination_type, tmp_path):
    model = three_adapters()
    names, weights = ["one", "two", "three"], [2.0, 1.0, 1.0]
    model.add_weighted_adapter(names, weights, "together", combination_type=combination_type)
    single = [masks(model, name) for name in names]
    together = masks(model, "together")
    for module in ("0", "2"):
        assert torch.equal(together[module], EXPECTED[combination_type](*(mask[module] for mask in single)))

    model.save_pretrained(tmp_path)
    loaded = [Masks.load(tmp_path / name) for name in names]
    assert Masks.combine(loaded, weights, combination_type) == Masks.load(tmp_path / "together")


def test_the_intersection_is_what_adapters_active_together_compute():
    model = three_adapters()
    model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "together")
    x = torch.randn(5, 8)
    with torch.no_grad():
        model.base_model.set_adapter(["one", "three"])
        expected = model(x)
        model.set_adapter("together")
        torch.testing.assert_close(model(x), expected)


def test_a_layer_that_an_adapter_does_not_mask_is_kept_whole_in_its_view(tmp_path):
    model = three_adapters((("0",), ("2",), ("0",)))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "either", combination_type="union")
    assert torch.equal(masks(model, "both")["0"], masks(model, "one")["0"])
    assert torch.equal(masks(model, "both")["2"], masks(model, "two")["2"])
    assert all(mask.all() for mask in masks(model, "either").values())
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "both")
    x = torch.randn(5, 8)
    model.set_adapter("both")
    assert torch.equal(loaded(x), model(x))


def test_a_combined_adapter_trains_nothing_and_can_be_merged_and_deleted():
    model = three_adapters()
    active = model.active_adapters
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "together")
    assert model.active_adapters == active
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    x = torch.randn(5, 8)
    with torch.no_grad():
        model.set_adapter("together")
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
    model.set_adapter("one")
    model.delete_adapter("together")
    assert not masks(model, "together")


def test_the_head_is_that_of_the_first_adapter():
    config = {"task_type": "SEQ_CLS", **FIELDS}
    model = get_peft_model(tiny_model("bert"), MaskConfig(seed=1, **config), adapter_name="one")
    model.add_adapter("two", MaskConfig(seed=2, **config))
    inputs = tiny_inputs(model.get_base_model())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save.two" in name:
                p.normal_()
        model.add_weighted_adapter(["two", "two"], [1.0, 1.0], "same")
        model.set_adapter("two")
        expected = model(**inputs).logits
        model.set_adapter("same")
        assert torch.equal(model(**inputs).logits, expected)
    heads = dict(model.named_parameters())
    copy = next(name for name in heads if "modules_to_save.same" in name)
    assert heads[copy].data_ptr() != heads[copy.replace(".same", ".two")].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "four"], [1, 1], "new"), r"no adapters named \['four'\]; loaded are \['one', 'three', 'two'\]"),
        ((["one", "two"], [1, 1], "three"), "there is an adapter named 'three' already"),
        ((["one", "two"], [1], "new"), "expected a weight for each of at least one adapter, got 1 for 2"),
        (([], [], "new"), "got 0 for 0"),
        ((["one", "two"], [1, -1], "new"), r"must be positive, got \[1, -1\]"),
        ((["one", "two"], [1, float("nan")], "new"), "must be positive"),
        ((["one", "two"], [1, 1], "new", "svd"), "combination_type must be one of .*'majority'.*, got 'svd'"),
    ],
)
def test_votes_without_meaning_are_refused_and_change_nothing(arguments, message):
    model = three_adapters()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert sorted(model.peft_config) == ["one", "three", "two"]
    assert all(
        layer.available_adapters == {"one", "two", "three"} for layer in model.modules() if isinstance(layer, MaskLayer)
    )


def test_the_difference_of_masks_is_what_one_switches_off_and_the_other_does_not():
    a = Masks({"layer": torch.tensor([True, False, True, False])})
    b = Masks({"layer": torch.tensor([True, True, False, False])})
    assert (a - b)["layer"].tolist() == [True, False, True, True]
    assert a - a == Masks({"layer": torch.ones(4, dtype=torch.bool)})
    assert (a - b) & b == a & b
    with pytest.raises(TypeError):
        a - 1
    with pytest.raises(ValueError, match=r"different modules"):
        Masks.combine([a, Masks({"other": torch.ones(4, dtype=torch.bool)})], [1, 1], "majority")
