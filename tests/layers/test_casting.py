"""Casts and moves of a model: which weights are off stays as it was trained, and what is merged can be taken out."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer
from tests.layers.test_modules import CASES, case, config, masked_layers

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.float16),
    "to, with a device": lambda model: model.to("cpu", torch.bfloat16),
    "to, as another": lambda model: model.to(torch.empty(0, dtype=torch.bfloat16)),
    "half and float": lambda model: model.half().float(),
    "double and float": lambda model: model.double().float(),
    "double and half": lambda model: model.double().half(),
    "type": lambda model: model.type(torch.float16),
    "type, of integers too": lambda model: model.type(torch.float64),
}
BINARIZERS = {
    "topk": {"target_sparsity": 0.3},
    "candidates": {"target_sparsity": 0.3, "candidates": 0.5},
    "threshold": {"binarizer": "threshold"},
    "n:m": {"binarizer": "n:m"},
    "bfloat16": {"target_sparsity": 0.3, "scores_dtype": "bfloat16"},
    "biases": {"target_sparsity": 0.3, "mask_biases": True},
}


def masks(model):
    return {name: layer.mask("default") for name, layer in masked_layers(model).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close_scores(**fields):
    """A model whose scores differ by less than 16 bits can tell, on both sides of the threshold."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    model = get_peft_model(base, MaskConfig(**{"target_modules": ["0", "2"], "candidates": None, **fields}))
    for layer in masked_layers(model).values():
        scores = layer.peft_mask_scores["default"]
        scores.data = (1e-9 * torch.randn_like(scores, dtype=torch.float32)).to(scores.dtype)
        if layer.has_budget("default"):
            scores.data += 1
    return model


@pytest.mark.parametrize("fields", BINARIZERS.values(), ids=list(BINARIZERS))
@pytest.mark.parametrize("cast", CASTS.values(), ids=list(CASTS))
def test_a_cast_leaves_the_mask_as_it_was(cast, fields):
    model = close_scores(**fields)
    before = masks(model)
    scores = [layer.peft_mask_scores["default"].clone() for layer in masked_layers(model).values()]
    cast(model)
    assert same(masks(model), before)
    for layer, old in zip(masked_layers(model).values(), scores, strict=True):
        new = layer.peft_mask_scores["default"]
        assert torch.equal(new.to(old.dtype), old)
        assert new.dtype in (old.dtype, torch.float64)
    x = torch.randn(2, 32, dtype=next(iter(masked_layers(model).values())).weight.dtype)
    model(x).float().sum().backward()
    assert all(layer.peft_mask_scores["default"].grad is not None for layer in masked_layers(model).values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "cast", [CASTS["half"], CASTS["type"], CASTS["double and float"]], ids=["half", "type", "back"]
)
def test_bits_are_not_cast(cast, name, tmp_path):
    base, x = case(name)
    model = get_peft_model(base, config(name, "candidates"))
    before = masks(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(case(name)[0], tmp_path)
    cast(loaded)
    assert same(masks(loaded), before)
    for layer in masked_layers(loaded).values():
        assert layer.peft_mask_bits["default"].dtype is torch.uint8
    parameter = next(iter(masked_layers(loaded).values())).stored.parameter
    assert loaded(x.to(parameter.dtype) if x.is_floating_point() else x).dtype is parameter.dtype


def test_training_goes_on_after_a_cast_and_back():
    def trained(cast):
        model = close_scores(**BINARIZERS["candidates"])
        optimizer = create_mask_optimizer(model)
        for step in range(6):
            if step == 3:
                cast(model)
            model(torch.ones(2, 32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return masks(model)

    # what a cast to 64 bits and back does is nothing
    assert same(trained(CASTS["double and float"]), trained(lambda model: model))


@pytest.mark.parametrize("cast", CASTS.values(), ids=list(CASTS))
@pytest.mark.parametrize("name", CASES)
def test_merged_cast_and_unmerged_is_the_base_cast(name, cast):
    base, _ = case(name)
    expected = cast(copy.deepcopy(base)).state_dict()
    model = get_peft_model(base, config(name), adapter_name="one")
    model.add_adapter("two", config(name, seed=2))
    model.merge_adapter(["one", "two"])
    cast(model)
    for layer in masked_layers(model).values():
        off = ~(layer.mask("one") & layer.mask("two"))
        assert (layer.stored.values()[off] == 0).all()
    found = model.unload().state_dict()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def test_a_weight_cast_past_the_model_is_unmerged_in_its_new_dtype():
    base, _ = case("linear")
    expected = base[0].weight.detach().bfloat16()
    model = get_peft_model(base, config("linear"))
    model.merge_adapter()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, expected)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_codes_of_a_merged_quantized_weight_are_not_cast(quant_type):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear = nn.Linear(128, 64)
    if quant_type == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(128, 64, quant_type=quant_type)
    layer.load_state_dict(linear.state_dict())
    base = nn.Sequential(layer.to("cpu"))
    codes = base[0].weight.data.clone()
    fields = {"init_weights": False, "target_sparsity": 0.3, "candidates": None}
    model = get_peft_model(base, MaskConfig(target_modules=["0"], **fields))
    model.merge_adapter()
    assert not torch.equal(base[0].base_layer.weight.data, codes)
    model.half()
    model.unmerge_adapter()
    assert torch.equal(base[0].base_layer.weight.data, codes)


@pytest.mark.parametrize(
    "move",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.share_memory()],
    ids=["deepcopy", "pickle", "share_memory"],
)
def test_a_copy_of_a_merged_model_can_be_cast_and_unmerged(move):
    base, x = case("linear")
    expected = base[0].weight.detach().half()
    model = get_peft_model(base, config("linear"))
    before = masks(model)
    model.merge_adapter()
    other = move(model).half()
    assert same(masks(other), before)
    other.unmerge_adapter()
    assert torch.equal(other.base_model.model[0].base_layer.weight, expected)
    with torch.no_grad():
        weight = torch.where(before["base_model.model.0"], expected, 0)
        bias = other.base_model.model[0].base_layer.bias
        assert torch.equal(other(x.half()), nn.functional.linear(x.half(), weight, bias))


def test_a_merged_model_without_values_moves_as_any_other():
    base, _ = case("linear")
    model = get_peft_model(base, config("linear"))
    model.merge_adapter()
    meta = copy.deepcopy(model).to("meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.to_empty(device="cpu").base_model.model[0].peft_mask_scores["default"].dtype is torch.float32
