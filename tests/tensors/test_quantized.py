"""Masks of quantized layers: they compute with dequantized x mask, and merge into the codes without rounding."""

import logging
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import peft_mask.layers.linear
import peft_mask.layers.registry
from peft_mask import MaskConfig, create_mask_optimizer, saliency_candidates
from peft_mask.layers.linear import Linear
from peft_mask.layers.mask_layer import MaskLayer
from tests.served_models import served

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels it does not find
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FORMATS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "int8": None,
    "torchao int8": None,
}
FIELDS = {"target_modules": ["0", "2"], "target_sparsity": 0.3, "candidates": 0.5, "init_weights": False}


def quantize(layer, name):
    if name == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        return layer
    if name == "int8":
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, **FORMATS[name])
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def floats():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))


@pytest.fixture(params=FORMATS)
def base(request):
    first, relu, second = floats()
    return nn.Sequential(quantize(first, request.param), relu, quantize(second, request.param)).eval()


def dequantized(layer):
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).clone()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return weight.data * (scales.unsqueeze(1) / 127)
    return weight.detach().dequantize()


def codes(layer):
    return (layer.weight.qdata if hasattr(layer.weight, "qdata") else layer.weight.data).clone()


def bases(model):
    return [module.get_base_layer() for module in model.modules() if isinstance(module, MaskLayer)]


def masks(model, adapter="default"):
    return [module.mask(adapter) for module in model.modules() if isinstance(module, MaskLayer)]


def reference(model, x, adapter="default"):
    first, second = bases(model)
    weights = [
        torch.where(mask, dequantized(layer), 0)
        for layer, mask in zip((first, second), masks(model, adapter), strict=True)
    ]
    return nn.functional.linear(nn.functional.linear(x, weights[0], first.bias).relu(), weights[1], second.bias)


def test_a_masked_layer_computes_with_the_dequantized_weight_under_the_mask(base):
    x = torch.randn(5, 128)
    model = get_peft_model(base, MaskConfig(**FIELDS))
    torch.testing.assert_close(model(x), reference(model, x), rtol=1e-4, atol=1e-5)


def test_a_masked_layer_computes_in_the_layers_own_dtype_and_answers_in_that_of_its_input():
    x = torch.randn(5, 128)
    layer = bnb.nn.Linear4bit(128, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(floats()[0].state_dict())
    model = get_peft_model(nn.Sequential(layer.to("cpu")), MaskConfig(**(FIELDS | {"target_modules": ["0"]})))
    (mask,), (base,) = masks(model), bases(model)
    weight = torch.where(mask, dequantized(base), 0).bfloat16()
    expected = nn.functional.linear(x.bfloat16(), weight, base.bias.bfloat16())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = x.to(dtype).detach().requires_grad_()
        output = model(given)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected.to(dtype), rtol=2**-7, atol=2**-7)
        output.float().sum().backward()
        torch.testing.assert_close(given.grad.float(), weight.float().sum(0).expand(5, 128), rtol=2**-6, atol=2**-6)
    assert model.base_model.model[0].peft_mask_scores["default"].grad.abs().sum() > 0


def test_scores_get_the_straight_through_gradient_and_no_dequantized_weight_is_kept(base, monkeypatch):
    x = torch.randn(5, 128)
    model = get_peft_model(base, MaskConfig(**FIELDS))
    made = []
    dequantize = MaskLayer._under_bits
    monkeypatch.setattr(MaskLayer, "_under_bits", lambda self, names: (made.append(self), dequantize(self, names))[1])
    loss = model(x).square().sum()
    assert len(made) == 2, "once a layer in the forward pass"
    loss.backward()
    assert {id(layer) for layer in made[2:]} == {id(layer) for layer in made[:2]}, "and again in the backward pass"
    weights = [dequantized(layer).requires_grad_() for layer in bases(model)]
    first, second = (torch.where(mask, weight, 0) for mask, weight in zip(masks(model), weights, strict=True))
    for masked in (first, second):
        masked.retain_grad()
    hidden = nn.functional.linear(x, first, bases(model)[0].bias).relu()
    nn.functional.linear(hidden, second, bases(model)[1].bias).square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, MaskLayer)]
    for layer, masked, weight in zip(layers, (first, second), weights, strict=True):
        expected = (masked.grad * weight.detach()).take(layer.positions("default").long())
        torch.testing.assert_close(layer.peft_mask_scores["default"].grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_pass_keeps_no_dequantized_weight_and_a_checkpoint_no_inputs_of_layers(
    base, monkeypatch, checkpointed
):
    model = get_peft_model(base, MaskConfig(**FIELDS)).train()
    made, given = [], []
    under_bits = MaskLayer._under_bits
    first, second = (module for module in model.modules() if isinstance(module, MaskLayer))

    def watched(self, adapter_names):
        weight, trained = under_bits(self, adapter_names)
        made.append(weakref.ref(weight))
        return weight, trained

    monkeypatch.setattr(MaskLayer, "_under_bits", watched)
    second.register_forward_pre_hook(lambda module, args: given.append(weakref.ref(args[0])))
    x = torch.randn(5, 128, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    assert [weight() for weight in made] == [None, None]
    assert (given[0]() is None) == checkpointed
    y.sum().backward()
    assert len(made) == (6 if checkpointed else 4)
    assert all(layer.peft_mask_scores["default"].grad.any() for layer in (first, second))


def test_merging_writes_codes_and_unmerging_restores_every_byte(base):
    before = [codes(layer) for layer in (base[0], base[2])]
    weights = [dequantized(layer) for layer in (base[0], base[2])]
    model = get_peft_model(base, MaskConfig(**FIELDS, seed=1), adapter_name="one")
    model.add_adapter("two", MaskConfig(**FIELDS, seed=2))
    model.add_adapter("three", MaskConfig(**FIELDS, seed=3))
    for adapter in ["two", "three", "two", "one", "two", "one", "three", "one", "three", "two"]:
        model.base_model.switch_adapter(adapter)
        for layer, mask, weight in zip(bases(model), masks(model, adapter), weights, strict=True):
            assert torch.equal(dequantized(layer), torch.where(mask, weight, 0))
            assert (~mask).any()
    model.base_model.switch_adapter(None)
    assert all(torch.equal(codes(layer), old) for layer, old in zip(bases(model), before, strict=True))


def test_merged_and_unmerged_agree_and_so_do_rows_of_a_mixed_batch(base):
    x = torch.randn(4, 128)
    model = get_peft_model(base, MaskConfig(**FIELDS, seed=1), adapter_name="one").eval()
    model.add_adapter("two", MaskConfig(**FIELDS, seed=2))
    with torch.no_grad():
        alone = {}
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            alone[adapter] = model(x)
            model.merge_adapter()
            # a layer of int8 quantizes its input as well, where the masked one does not
            torch.testing.assert_close(model(x), alone[adapter], rtol=0, atol=0.05)
            model.unmerge_adapter()
            assert torch.equal(model(x), alone[adapter])
        with model.disable_adapter():
            alone["__base__"] = model(x)
        names = ["two", "__base__", "one", "two"]
        mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-3, atol=0.05 if name == "__base__" else 1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_loaded_masks_serve_rows_and_dequantize_once_a_layer(base, exact, monkeypatch):
    model = served(base, target_modules=["0", "2"], sparsity=0.3)
    model.base_model.set_exact(exact)
    x = torch.randn(4, 128)
    names = ["two", "__base__", "one", "two"]
    with torch.no_grad():
        alone = {}
        with model.disable_adapter():
            alone["__base__"] = model(x)
        for name in ("one", "two"):
            alone[name] = reference(model, x, name)
            model.set_adapter(name)
            torch.testing.assert_close(model(x), alone[name], rtol=1e-4, atol=1e-4)
        model(x, adapter_names=names)  # values are gathered
        dequantizing = []
        original = Linear._weight_for
        monkeypatch.setattr(Linear, "_weight_for", lambda self, x: (dequantizing.append(1), original(self, x))[1])
        mixed = model(x, adapter_names=names)
    assert len(dequantizing) == 2
    assert not torch.allclose(alone["one"], alone["two"], atol=0.1)
    for row, name in enumerate(names):
        # of int8 the base quantizes what goes in, differently by a little where it is another row's as well
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-3, atol=0.05 if name == "__base__" else 1e-4)
    model.merge_adapter(["one"])
    model.unmerge_adapter()
    with torch.no_grad():
        assert torch.equal(model(x, adapter_names=names), mixed)


def test_running_the_base_changes_nothing_of_what_is_dequantized(base):
    model = get_peft_model(base, MaskConfig(**FIELDS)).eval()
    before = [dequantized(layer) for layer in bases(model)]
    x = torch.randn(4, 128)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(model, x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(dequantized(layer), old) for layer, old in zip(bases(model), before, strict=True))


def test_an_adapter_trained_on_floats_loads_on_the_quantized_base_and_back(base, tmp_path):
    trained = get_peft_model(floats(), MaskConfig(**FIELDS))
    trained.save_pretrained(tmp_path / "floats")
    model = PeftModel.from_pretrained(base, tmp_path / "floats")
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(trained), strict=True))
    model.save_pretrained(tmp_path / "quantized")
    back = PeftModel.from_pretrained(floats(), tmp_path / "quantized")
    assert all(torch.equal(a, b) for a, b in zip(masks(back), masks(trained), strict=True))


def test_another_quantized_base_is_refused(base, tmp_path):
    other = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))
    get_peft_model(other, MaskConfig(**FIELDS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the base weight is not the one it was trained on"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_layer_not_yet_quantized_is_refused():
    layer = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(ValueError, match=r"'0' of type Linear4bit is not supported: it is not quantized yet"):
        get_peft_model(nn.Sequential(layer), MaskConfig(target_modules=["0"]))
    eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    with pytest.raises(ValueError, match=r"its weight has dtype torch.float32 and is not quantized yet"):
        get_peft_model(nn.Sequential(eight), MaskConfig(target_modules=["0"]))


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "fp4"])
def test_codes_packed_for_the_cpu_are_put_in_order_again(name):
    """As bitsandbytes packs them in a forward pass in evaluation, where the processor has the instructions."""
    layer = quantize(floats()[0], name).eval()
    before, expected = codes(layer), dequantized(layer)
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.shape != before.shape
    model = get_peft_model(nn.Sequential(layer), MaskConfig(target_modules=["0"]))
    assert torch.equal(codes(layer), before)
    # the scales were rounded to bfloat16
    torch.testing.assert_close(dequantized(layer), expected, rtol=2**-8, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():
        model(torch.randn(2, 128))
    assert torch.equal(codes(layer), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_quantized_model_is_saved_and_loaded_as_any_other(bits, tmp_path):
    kwargs = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=64, num_key_value_heads=2, **sizes)
    ).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**kwargs), device_map="cpu"
    )
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM", target_sparsity=0.1))
    ids = torch.arange(20).view(2, 10)
    optimizer = create_mask_optimizer(model)
    before = [mask.clone() for mask in masks(model)]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((a != b).any() for a, b in zip(masks(model), before, strict=True))
    merged = model.eval().merge_and_unload()
    assert not any(isinstance(module, MaskLayer) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    pairs = [(a, b) for a, b in zip(merged.modules(), loaded.modules(), strict=True) if isinstance(a, quantized)]
    assert pairs
    assert all(torch.equal(dequantized(a), dequantized(b)) for a, b in pairs)


class OtherQuantized(nn.Module):
    """A layer as another library stores it: codes of its own under a name of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.codes = nn.Parameter((linear.weight.data * 100).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.codes / 100, self.bias)


class OtherBackend(QuantizationBackend):
    layer_type, backend_name = "linear", "hqq"

    def get_base_weight(self, base_layer):
        return base_layer.codes / 100


def known_as(backend, monkeypatch):
    for module in (peft_mask.layers.registry, peft_mask.layers.linear):
        found = lambda layer: backend if isinstance(layer, OtherQuantized) else None  # noqa: E731
        monkeypatch.setattr(module, "quantization_backend", found)


def test_what_can_only_be_dequantized_is_trained_and_not_merged(monkeypatch, tmp_path):
    known_as(OtherBackend(), monkeypatch)
    plain, relu, second = floats()
    model = get_peft_model(nn.Sequential(OtherQuantized(plain), relu, second), MaskConfig(**FIELDS, seed=0))
    x = torch.randn(5, 128)
    layer = model.base_model.model[0]
    weight = torch.where(layer.mask("default"), layer.get_base_layer().codes / 100, 0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, plain.bias))
    model(x).sum().backward()
    assert layer.peft_mask_scores["default"].grad.abs().sum() > 0

    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot merge a mask into a weight quantized by hqq: it would have to be"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.merged for module in model.modules() if isinstance(module, MaskLayer))

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(OtherQuantized(plain), relu, second), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))


def test_what_cannot_be_dequantized_is_refused(monkeypatch):
    known_as(ForwardOnlyQuantizationBackend("gptq"), monkeypatch)
    with pytest.raises(ValueError, match=r"not supported: gptq offers no way to dequantize its weight"):
        get_peft_model(nn.Sequential(OtherQuantized(floats()[0])), MaskConfig(target_modules=["0"]))


def test_saliency_of_quantized_weights_is_refused(base):
    model = get_peft_model(base, MaskConfig(**FIELDS))
    with pytest.raises(ValueError, match=r"the weights of \['0', '2'\] are quantized, and no gradient reaches them"):
        saliency_candidates(model, [torch.randn(2, 128)], lambda x: model(x).sum())
