"""Values of weights that are off are gathered once, and again when the weights or the mask may have changed."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, hotswap_adapter
from peft_mask.format.packing import pack_bits
from peft_mask.layers import serving
from tests.layers.test_modules import with_masks_written
from tests.served_models import layers_of, served

NAMES = ["two", "one", "__base__", "one"]
X = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7)).eval()


def model_of(base):
    return served(base, target_modules=["0", "2"])


def check(model, x=X, tolerance=1e-5):
    """Every row is what the base as it is now gives with the row's mask written into it."""
    base = copy.deepcopy(model).unload()
    with torch.no_grad():
        mixed = model(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            plain = base if name == "__base__" else with_masks_written(base, model, [name])[0]
            torch.testing.assert_close(mixed[row], plain(x)[row], rtol=tolerance, atol=tolerance)
    return mixed


def known(model):
    return [len(layer.known_zeros) for layer in layers_of(model)]


def test_values_are_gathered_once(monkeypatch):
    model = model_of(mlp())
    gathered = []
    original = serving.zeros_of
    monkeypatch.setattr(serving, "zeros_of", lambda *args, **kw: (gathered.append(1), original(*args, **kw))[1])
    first = check(model)
    assert len(gathered) == 4
    assert torch.equal(check(model), first)
    assert len(gathered) == 4
    assert known(model) == [2, 2]


CHANGES = {
    "trained on": lambda model: [layer.base_layer.weight.mul_(2) for layer in layers_of(model)],
    "loaded": lambda model: [
        layer.base_layer.load_state_dict({k: 3 * v for k, v in layer.base_layer.state_dict().items()})
        for layer in layers_of(model)
    ],
    "another parameter": lambda model: [
        setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(layer.mask_shape), False))
        for layer in layers_of(model)
    ],
    "another tensor in it": lambda model: [
        setattr(layer.base_layer.weight, "data", torch.randn(layer.mask_shape)) for layer in layers_of(model)
    ],
    "another mask": lambda model: [
        layer.peft_mask_bits.fill("one", pack_bits(~layer.mask("one"))) for layer in layers_of(model)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_gathered_anew(change):
    model = model_of(mlp())
    before = check(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert not torch.allclose(check(model), before, atol=1e-2)


def test_merging_and_unmerging_drop_what_is_known():
    model = model_of(mlp())
    before = check(model)
    model.merge_adapter(["one"])
    assert known(model) == [0, 0]
    model.unmerge_adapter()
    assert known(model) == [0, 0]
    assert torch.equal(check(model), before)
    model.base_model.switch_adapter("two")
    for layer in layers_of(model):
        layer.base_layer.weight.data[0] *= 2  # nobody counts this, but values are gathered after it
    model.unmerge_adapter()
    check(model)


def test_casts_and_moves_drop_what_is_known():
    model = model_of(mlp())
    check(model)
    model.bfloat16()
    assert known(model) == [0, 0]
    check(model, X.bfloat16(), 5e-2)
    model.double()
    check(model, X.double())
    model.to("cpu")
    assert known(model) == [0, 0]


def test_hotswapping_takes_the_new_masks(tmp_path):
    for seed in range(2):
        config = MaskConfig(
            target_modules=["0", "2"], candidates=None, target_sparsity=0.3, init_weights=False, seed=seed
        )
        get_peft_model(mlp(), config).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(mlp(), tmp_path / "0", adapter_name="one")
    model.load_adapter(tmp_path / "0", "two")
    model.eval()
    before = check(model)
    with torch.inference_mode():
        hotswap_adapter(model, str(tmp_path / "1"), "one", torch_device="cpu")
    after = check(model)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert known(model) == [1, 1]


def test_masks_that_nobody_counts_changes_of_are_not_remembered(tmp_path):
    with torch.inference_mode():
        model = model_of(mlp())
        first = model(X, adapter_names=NAMES)
        for layer in layers_of(model):
            layer.peft_mask_bits["one"].copy_(pack_bits(~layer.mask("one")))
        assert not torch.allclose(model(X, adapter_names=NAMES), first, atol=1e-2)
    assert known(model) == [0, 0]


def test_copies_of_a_model_know_nothing():
    model = model_of(mlp())
    check(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert known(other) == [0, 0]
        check(other)


def test_weights_that_nobody_counts_changes_of_are_not_remembered():
    with torch.inference_mode():
        base = mlp()
    model = model_of(base)
    first = check(model)
    with torch.inference_mode():
        for layer in layers_of(model):
            layer.base_layer.weight.mul_(2)
    assert not torch.allclose(check(model), first, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_steps_of_fused_optimizers_on_the_base_are_noticed(training):
    """They write into weights without a trace, as those of other libraries do."""
    model = model_of(mlp())
    first = check(model)
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers_of(model)]
    optimizer = torch.optim.SGD(weights, lr=1.0, fused=True)
    check(model.train(training).eval())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    model.train(training)
    optimizer.step()
    for weight in weights:
        weight.requires_grad_(False)
    assert not torch.allclose(check(model.eval()), first, atol=1e-2)


def test_what_was_gathered_in_inference_mode_serves_gradients():
    model = model_of(mlp())
    x = X.clone().requires_grad_()
    with torch.inference_mode():
        expected = model(X, adapter_names=NAMES)
    assert known(model) == [2, 2]
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected)
    model(x, adapter_names=NAMES).sum().backward()
    assert x.grad.abs().sum() > 0
