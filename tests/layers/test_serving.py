"""Linear layers and embeddings with loaded masks: rows of several adapters, and adapters that are not merged."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask.layers import serving
from tests.layers.test_modules import with_masks_written
from tests.served_models import alone, layers_of, served

NAMES = ["two", "__base__", "one", "two", "one"]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-12}


def linear(bias=True, conv1d=False, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(7, 9) if conv1d else nn.Linear(9, 7, bias=bias)).to(dtype).eval()


def expected_of(base, model, x, names=NAMES):
    """Each row by the base with its mask written into it."""
    plain = {name: base if name == "__base__" else with_masks_written(base, model, [name])[0] for name in set(names)}
    assert not torch.allclose(plain["one"](x), plain["two"](x), atol=1e-2)
    assert not torch.allclose(plain["one"](x), base(x), atol=1e-2)
    return torch.stack([plain[name](x)[row] for row, name in enumerate(names)])


@pytest.fixture(params=[1, 3, 130], ids="{} tokens a row".format)
def tokens(request):
    """So few that rows are corrected, or so many that the weight is patched."""
    assert 3 * 2 < serving.WIDE <= 130
    return request.param


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"conv1d": True}], ids=str)
def test_each_row_is_computed_with_its_own_mask(kind, dtype, tokens, exact):
    base = linear(**kind, dtype=dtype)
    model = served(copy.deepcopy(base), target_modules=["0"])
    model.base_model.set_exact(exact)
    x = torch.randn(5, tokens, 9).to(dtype)
    with torch.no_grad():
        expected = expected_of(base, model, x)
        torch.testing.assert_close(model(x, adapter_names=NAMES), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
        if tokens == 1:  # one dimension less
            mixed = model(x[:, 0], adapter_names=NAMES)
            torch.testing.assert_close(mixed, expected[:, 0], rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_rows_that_are_to_be_exact_have_the_bits_of_merged_weights(tokens):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"])
    model.base_model.set_exact(True)
    x = torch.randn(6, tokens, 9)
    names = ["one", "two", "__base__"] * 2
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for start, name in enumerate(names[:3]):
            plain = base if name == "__base__" else with_masks_written(base, model, [name])[0]
            assert torch.equal(mixed[start::3], plain(x[start::3].contiguous()))


def test_an_adapter_that_is_not_merged_has_the_bits_of_merged_weights(tokens):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"], mask_biases=True)
    x = torch.randn(5, tokens, 9)
    with torch.no_grad():
        for names in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(names)
            assert torch.equal(model(x), with_masks_written(base, model, names)[0](x))


def test_few_tokens_are_corrected_without_a_masked_weight_and_many_without_a_correction(monkeypatch):
    model = served(linear(), target_modules=["0"])
    made = []
    for name in ("corrected_product", "patched_products"):
        original = getattr(serving, name)
        monkeypatch.setattr(
            serving,
            name,
            lambda *args, name=name, original=original, **kw: (made.append(name), original(*args, **kw))[1],
        )
    monkeypatch.setattr(serving.ServedLinear, "_under_bits", None)
    with torch.no_grad():
        model(torch.randn(5, 9), adapter_names=NAMES)
        assert made == ["corrected_product"]
        model(torch.randn(5, 130, 9), adapter_names=NAMES)
        assert made[1:] == ["patched_products"]
        model(torch.randn(140, 9), adapter_names=["one"] * 138 + ["two"] * 2)
        assert sorted(made[2:]) == ["corrected_product", "patched_products"]


def test_biases_are_masked_row_by_row(tokens):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"], mask_biases=True, sparsity=0.5)
    x = torch.randn(5, tokens, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=NAMES), expected_of(base, model, x))
    assert any((~layer.mask("one")).any() for layer in layers_of(model) if layer.mask_shape == (7,))


def test_a_mask_that_keeps_everything_is_the_base():
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"], sparsity={"one": 0, "two": 0.2})
    x = torch.randn(3, 9)
    with torch.no_grad():
        mixed = model(x, adapter_names=["one", "two", "one"])
        torch.testing.assert_close(mixed[::2], base(x)[::2])
        assert not torch.allclose(mixed[1], base(x)[1])


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_reach_the_input(tokens, exact):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"])
    model.base_model.set_exact(exact)
    x = torch.randn(5, tokens, 9)
    gradients = []
    for compute in (lambda x: expected_of(base, model, x), lambda x: model(x, adapter_names=NAMES)):
        leaf = x.clone().requires_grad_()
        compute(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    model.set_adapter("two")
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad[0], gradients[0][0])


def test_gradients_of_a_base_that_is_trained_are_not_those_of_weights_that_are_off():
    model = served(linear(), target_modules=["0"])
    layer = layers_of(model)[0]
    layer.base_layer.weight.requires_grad_()
    model(torch.randn(2, 9), adapter_names=["one", "one"]).sum().backward()
    assert torch.equal(layer.base_layer.weight.grad != 0, layer.mask("one"))


@pytest.mark.parametrize("names", [["one", "two"], ["one", "one"]])
def test_gradients_reach_a_bias(tokens, names):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"])
    bias = layers_of(model)[0].base_layer.bias.requires_grad_()
    output = model(torch.randn(2, tokens, 9), adapter_names=names)
    output.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((7,), 2.0 * tokens))


def test_autocast_applies(tokens):
    model = served(linear(), target_modules=["0"])
    x = torch.randn(5, tokens, 9)
    with torch.no_grad():
        expected = model(x, adapter_names=NAMES)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, adapter_names=NAMES)
            mixed_again = model(x.bfloat16(), adapter_names=NAMES)
    assert mixed.dtype == mixed_again.dtype == torch.bfloat16
    for found in (mixed, mixed_again):
        torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=5e-2)


def test_a_correction_of_16_bits_errs_no_more_than_the_merged_product():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 256)).bfloat16().eval()
    model = served(copy.deepcopy(base), target_modules=["0"], sparsity=0.005)
    x = torch.randn(16, 512).bfloat16()
    names = ["one", "two"] * 8
    with torch.no_grad():
        found = model(x, adapter_names=names).double()
        merged, right = (
            expected_of(base.to(d), model, x.to(d), names).double() for d in (torch.bfloat16, torch.double)
        )
    assert (found - right).abs().mean() < 1.1 * (merged - right).abs().mean()


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_is_looked_up_once_and_has_the_bits_of_each_adapter(padding):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 6, padding_idx=padding), nn.Linear(6, 3)).eval()
    model = served(copy.deepcopy(base), target_modules=["0"])
    ids = torch.randint(0, 11, (5, 4))
    ids[1], ids[2, :2] = 10, 2
    seen = []
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        mixed = model.base_model.model[0]
        expected = {name: alone(model, name, lambda: mixed(ids)) for name in set(NAMES)}
        seen.clear()
        with model.base_model._enable_peft_forward_hooks(adapter_names=NAMES):
            found = mixed(ids)
    assert seen == [1]
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], expected[name][row])
    assert not torch.equal(expected["one"], expected["two"])


def test_rows_run_the_hooks_of_the_base_layer_once(tokens):
    base = linear()
    model = served(copy.deepcopy(base), target_modules=["0"])
    x = torch.randn(5, tokens, 9)
    with torch.no_grad():
        expected = 2 * expected_of(base, model, x)
        model.base_model.model[0].base_layer.register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(model(x, adapter_names=NAMES), expected)


def test_a_layer_that_only_one_adapter_masks_is_the_base_for_the_others(tokens):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 7)).eval()
    model = served(copy.deepcopy(base), ["one"], target_modules=["0"])
    other = served(copy.deepcopy(base), ["two"], target_modules=["1"])
    model.add_adapter("two", other.peft_config["two"])
    layers_of(model)[1].peft_mask_bits.fill("two", layers_of(other)[0].packed_mask("two"))
    model.eval()
    x = torch.randn(3, tokens, 9)
    names = ["two", "one", "__base__"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone(model, name, lambda: model(x))[row])


@pytest.mark.parametrize("exact", [False, True])
def test_rows_without_tokens_have_no_output(exact):
    model = served(linear(), target_modules=["0"])
    model.base_model.set_exact(exact)
    with torch.no_grad():
        assert model(torch.zeros(2, 0, 9), adapter_names=["one", "two"]).shape == (2, 0, 7)
