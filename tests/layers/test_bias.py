"""Masks of biases: masks like all others, of the layers that have one. What any mask owes is in test_binarizers and
test_modules."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_mask import MaskConfig, Masks, hold_zeros, saliency_candidates, training_memory
from peft_mask.layers.mask_layer import MaskLayer
from tests.layers.test_modules import Attention
from tests.tiny_models import tiny_inputs, tiny_model

FIELDS = {"candidates": None, "target_sparsity": 0.3, "init_weights": False, "seed": 0}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 5, bias=False))


def masked(**fields):
    fields = {"target_modules": ["0", "2", "4"], "mask_biases": True} | FIELDS | fields
    return get_peft_model(mlp(), MaskConfig(**fields)).eval()


def masks_of(model, adapter="default"):
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, MaskLayer)}
    return {name: layer.mask(adapter) for name, layer in layers.items() if adapter in layer.available_adapters}


def by_hand(masks):
    plain = mlp()
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = name.replace(".bias_mask", ".bias") if "bias" in name else f"{name}.weight"
            plain.get_parameter(parameter)[~mask] = 0
    return plain.eval()


X = torch.arange(36.0).view(3, 12).sin()


def test_every_bias_of_a_masked_layer_is_masked_and_nothing_is_there_twice(tmp_path):
    model = masked()
    masks = masks_of(model)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "0": (20, 12),
        "0.bias_mask": (20,),
        "2": (5, 20),
        "2.bias_mask": (5,),
        "4": (5, 5),
    }
    assert int((~masks["0.bias_mask"]).sum()) == 6
    torch.testing.assert_close(model(X), by_hand(masks)(X))
    base = [name for name in model.state_dict() if "peft_mask" not in name]
    assert len(base) == len(mlp().state_dict())
    assert sum(1 for _ in model.parameters()) == len(base) + len(masks)
    model.save_pretrained(tmp_path)
    assert {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        f"{name}.peft_mask_bits" for name in masks
    }


def test_merging_unmerging_disabling_and_unloading_restore_biases_to_the_bit():
    model, base = masked(), mlp()
    expected = by_hand(masks_of(model))
    model.merge_adapter()
    layer = model.base_model.model[0]
    assert torch.equal(layer.base_layer.bias, expected[0].bias)
    assert not torch.equal(layer.base_layer.bias, base[0].bias)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert torch.equal(layer.base_layer.bias, base[0].bias)
    model.base_model.switch_adapter("default")
    assert torch.equal(model(X), expected(X))
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, base[0].bias)
    unloaded = copy.deepcopy(model).unload()
    plain = model.merge_and_unload()
    for one, other in ((unloaded, base), (plain, expected)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_adapters_with_and_without_masks_of_biases_live_beside_each_other(tmp_path):
    model = masked()
    model.add_adapter("plain", MaskConfig(target_modules=["0", "2"], **FIELDS | {"seed": 1}))
    assert masks_of(model, "plain").keys() == {"0", "2"}
    for adapter in ("plain", "default"):
        model.base_model.set_adapter(adapter)
        torch.testing.assert_close(model(X), by_hand(masks_of(model, adapter))(X))
    mixed = model(X, adapter_names=["plain", "default", "__base__"])
    for row, adapter in enumerate(["plain", "default"]):
        torch.testing.assert_close(mixed[row], by_hand(masks_of(model, adapter))(X)[row])
    torch.testing.assert_close(mixed[2], mlp()(X)[2])

    model.base_model.add_weighted_adapter(["plain", "default"], [1.0, 1.0], "both")
    both = masks_of(model, "both")
    assert torch.equal(both["0.bias_mask"], masks_of(model)["0.bias_mask"]), "what does not mask a bias keeps it"
    assert torch.equal(both["4"], masks_of(model)["4"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path / "both").eval()
    assert {name: mask.tolist() for name, mask in masks_of(again).items()} == {n: m.tolist() for n, m in both.items()}

    model.base_model.set_adapter("plain")
    model.delete_adapter("default")
    assert "default" not in model.base_model.model[0].bias_mask.available_adapters
    torch.testing.assert_close(model(X), by_hand(masks_of(model, "plain"))(X))


def test_an_adapter_refused_for_its_biases_leaves_none_to_the_next(tmp_path):
    good, hostile = tmp_path / "good", tmp_path / "hostile"
    for folder in (good, hostile):
        masked(mask_biases=False).save_pretrained(folder)
    config = hostile / "adapter_config.json"
    config.write_text(config.read_text().replace('"mask_biases": false', '"mask_biases": true'))
    model = mlp()
    with pytest.raises(ValueError, match="do not mask the same layers"):
        PeftModel.from_pretrained(model, hostile)
    loaded = PeftModel.from_pretrained(model, good).eval()
    assert masks_of(loaded).keys() == {"0", "2", "4"}
    assert torch.equal(loaded(X), masked(mask_biases=False)(X))


def test_a_union_of_one_that_masks_biases_elsewhere_keeps_the_others():
    model = masked(target_modules=["0"])
    model.add_adapter("plain", MaskConfig(target_modules=["2"], **FIELDS))
    model.base_model.add_weighted_adapter(["plain", "default"], [1.0, 1.0], "both")
    both = masks_of(model, "both")
    assert both["2.bias_mask"].all()
    assert torch.equal(both["0.bias_mask"], masks_of(model)["0.bias_mask"])


def test_as_a_value_they_are_named_after_their_layer_and_come_back(tmp_path):
    model = masked()
    model.save_pretrained(tmp_path / "a")
    masks = Masks.load(tmp_path / "a", base=mlp())
    assert masks.zeros["0.bias_mask"] == 6
    (masks & masks).save(tmp_path / "b", base=mlp())
    Masks(dict(masks)).save(tmp_path / "c")
    for folder in "bc":
        loaded = PeftModel.from_pretrained(mlp(), tmp_path / folder).eval()
        assert torch.equal(loaded(X), model(X))
    plain = PeftModel.from_pretrained(mlp(), tmp_path / "a").merge_and_unload().requires_grad_()
    assert len(hold_zeros(plain, masks)) == 5
    plain(X).square().sum().backward()
    assert not plain[0].bias.grad[~masks["0.bias_mask"]].any()
    assert plain[0].bias.grad.any()


def test_a_transformer_trains_them_and_transformers_own_door_takes_them(tmp_path):
    model = get_peft_model(tiny_model("bert"), MaskConfig(mask_biases=True, **FIELDS))
    biases = {name: mask for name, mask in masks_of(model).items() if name.endswith(".bias_mask")}
    assert len(biases) == len(masks_of(model)) / 2 == 13
    model(**tiny_inputs(model, labels=True)).loss.backward()
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert query.bias_mask.peft_mask_scores["default"].grad.shape == (32,)
    model.save_pretrained(tmp_path)
    plain = tiny_model("bert").eval()
    plain.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(plain(**tiny_inputs(plain)).logits, model.eval()(**tiny_inputs(plain)).logits)


def test_candidates_memory_and_scores_know_them():
    config = MaskConfig(target_modules=["0"], mask_biases=True, candidates=0.5, target_sparsity=0.1)
    model = get_peft_model(mlp(), config)
    positions = saliency_candidates(model, [X], lambda x: model(x).square().sum())
    assert len(positions["0.bias_mask"]) == 10
    model.base_model.set_candidates(positions)
    model.base_model.set_scores(lambda name, weight: weight.sign())
    bias = model.base_model.model[0].bias_mask
    assert torch.equal(bias.peft_mask_scores["default"], mlp()[0].bias.sign().take(positions["0.bias_mask"].long()))
    with_biases, without = (
        training_memory(tiny_model("bert"), MaskConfig(mask_biases=flag), tiny_inputs(tiny_model("bert"))).scores
        for flag in (True, False)
    )
    assert with_biases > without


def test_what_has_no_bias_of_its_own_is_left_alone():
    fields = {"target_modules": ["attention"], "mask_biases": True}
    assert masks_of(get_peft_model(Attention(), MaskConfig(**fields))).keys() == {
        "attention",
        "attention.base_layer.out_proj",
    }


@pytest.mark.parametrize("fields", [{"structure": "row"}, {"binarizer": "n:m"}])
def test_units_that_a_bias_does_not_have_are_refused(fields):
    with pytest.raises(ValueError, match=r"mask_biases=True is for masks of single weights, .*leave one of them out"):
        MaskConfig(mask_biases=True, candidates=None, **fields)


def test_a_second_adapter_with_a_masked_head_takes_no_bias_for_a_layer():
    config = MaskConfig.paper(task_type="SEQ_CLS", mask_biases=True, seed=0)
    model = get_peft_model(tiny_model("bert"), copy.deepcopy(config))
    model.add_adapter("b", config)
    assert masks_of(model, "b").keys() == masks_of(model).keys()
    assert "classifier.bias_mask" in masks_of(model)
