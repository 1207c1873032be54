"""Weights that are computed anew in each forward pass, into which nothing can be merged: refused, or left out."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from peft_mask import MaskConfig
from tests.tiny_models import tiny_inputs, tiny_model

COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.3),
}
LAYERS = {
    "0": (lambda: nn.Linear(8, 8), "weight"),
    "1": (lambda: nn.Conv1d(8, 8, 3), "weight"),
    "2": (lambda: nn.Embedding(8, 8), "weight"),
    "3": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
}


def layers():
    return nn.Sequential(*(make() for make, _ in LAYERS.values()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=list(COMPUTED))
def test_a_weight_that_is_computed_is_refused_before_anything_changes(compute, name):
    model, parameter = layers(), LAYERS[name][1]
    compute(model[int(name)], parameter)
    kinds = [type(module) for module in model]
    with pytest.raises(ValueError, match=rf"'{name}' of type \w+ is not supported: its {parameter} is computed anew"):
        get_peft_model(model, MaskConfig(target_modules=list(LAYERS)))
    assert [type(module) for module in model] == kinds


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_old_weight_norm_is_refused_and_may_be_removed():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"Make it a parameter again first, .* remove_weight_norm"):
        get_peft_model(model, MaskConfig(target_modules=["0"]))
    nn.utils.remove_weight_norm(model[0])
    assert get_peft_model(model, MaskConfig(target_modules=["0"])).base_model.model[0].base_layer is not None


def test_a_bias_that_is_computed_is_refused_if_it_is_to_be_masked():
    def model():
        linear = nn.Linear(8, 8)
        nn.init.normal_(linear.bias)
        return nn.Sequential(prune.random_unstructured(linear, "bias", amount=0.5))

    with pytest.raises(ValueError, match=r"cannot mask '0.bias_mask': its bias is computed anew"):
        get_peft_model(model(), MaskConfig(target_modules=["0"], mask_biases=True))
    torch.manual_seed(0)
    base = model()
    x = torch.randn(2, 8)
    expected = base(x)
    torch.testing.assert_close(get_peft_model(base, MaskConfig(target_modules=["0"]))(x), expected)


def test_default_targets_leave_computed_weights_out():
    base = tiny_model("bert")
    layer = base.bert.encoder.layer[1]
    prune.l1_unstructured(layer.attention.self.query, "weight", amount=0.3)
    parametrizations.weight_norm(layer.attention.self.key)
    inputs = tiny_inputs(base)
    with torch.no_grad():
        expected = base(**inputs).logits
        with pytest.warns(UserWarning, match="that are not masked: .*self.query, .*self.key, since its weight is comp"):
            model = get_peft_model(base, MaskConfig(task_type="SEQ_CLS")).eval()
        torch.testing.assert_close(model(**inputs).logits, expected)
    targets = model.peft_config["default"].target_modules
    assert [name for name in sorted(targets) if "layer.1.attention.self" in name] == [
        "bert.encoder.layer.1.attention.self.value"
    ]
    assert "bert.encoder.layer.0.attention.self.query" in targets


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_weight_that_is_computed_only_after_wrapping_is_masked_and_not_merged():
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, MaskConfig(target_modules=["0"], init_weights=False, target_sparsity=0.05))
    x, layer = torch.randn(2, 8), model.base_model.model[0]
    parametrize.register_parametrization(layer.base_layer, "weight", Half())
    expected = nn.functional.linear(x, torch.where(layer.mask("default"), layer.base_layer.weight, 0), base[0].bias)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="weight of a ParametrizedLinear: its weight is computed anew"):
        model.merge_adapter()
    assert not layer.merged
    torch.testing.assert_close(model(x), expected)
