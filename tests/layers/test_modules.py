"""Every type of module that can be masked, against its base layer with the masked weight written into it."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from peft_mask import MaskConfig, Masks
from peft_mask.format.mask_file import BIAS
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.tensors.stored import StoredWeight


class Experts(nn.Module):
    """Stacked weights that no module holds, as transformers stores a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 5) / 3)

    def forward(self, x):
        return torch.einsum("be,beo->bo", x[:, :3].softmax(1), torch.einsum("bi,eio->beo", self._hidden(x), self.down))

    def _hidden(self, x):
        return torch.einsum("bi,eoi->bo", x, self.up).relu().repeat(1, 2)[:, :8]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(query=x, key=x, value=x, need_weights=False)[0]


def with_a_trained_padding_row(embedding):
    nn.init.normal_(embedding.weight)  # which starts as zeros, and its scores' gradient would be zero either way
    return embedding


TOKENS = torch.tensor([[1, 2, 5], [5, 9, 0], [2, 2, 10], [4, 4, 4]])
# name -> (what makes the module, its input)
CASES = {
    "linear": (lambda: nn.Linear(9, 7), torch.randn(4, 9)),
    "Conv1D": (lambda: Conv1D(7, 9), torch.randn(4, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(4, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", dilation=2), torch.randn(4, 4, 7, 7)),
    "conv2d reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", bias=False),
        torch.randn(4, 3, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), torch.randn(4, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(11, 6), TOKENS),
    "embedding with padding": (
        lambda: with_a_trained_padding_row(nn.Embedding(11, 6, padding_idx=2, scale_grad_by_freq=True)),
        TOKENS,
    ),
    "scaled embedding": (
        lambda: with_a_trained_padding_row(Gemma3TextScaledWordEmbedding(11, 6, padding_idx=2, embed_scale=3.0)),
        TOKENS,
    ),
    "attention": (Attention, torch.randn(4, 5, 8)),
    "experts": (Experts, torch.randn(4, 8)),
}
TARGETS = {
    "attention": {"target_modules": ["attention"]},
    "experts": {"target_parameters": ["0.up", "0.down"], "target_modules": []},
}
FIELDS = {
    "all weights": {"candidates": None, "target_sparsity": 0.3},
    "candidates": {"candidates": 0.5, "target_sparsity": 0.3},
    "threshold": {"candidates": None, "binarizer": "threshold", "init_sparsity": 0.3},
    "sign": {"candidates": None, "binarizer": "sign", "init_sparsity": 0.3},
    "bernoulli": {"candidates": 0.5, "binarizer": "bernoulli"},
    "biases": {"candidates": None, "target_sparsity": 0.3, "mask_biases": True},
}


def case(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, x = CASES[name]
    base = nn.Sequential(make()).eval().to(dtype)
    return base, x.to(dtype) if x.is_floating_point() else x


def config(name, fields="all weights", seed=0, **more):
    target = TARGETS.get(name, {"target_modules": ["0"]})
    return MaskConfig(**target, **FIELDS[fields], init_weights=False, seed=seed, **more)


def masked_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskLayer)}


def with_masks_written(base, model, adapters=("default",)):
    """A copy of the base model with zeros where the adapters' masks are off, and its masked parameters in order."""
    plain, written = copy.deepcopy(base), []
    for name, layer in masked_layers(model.base_model.model).items():
        owner = plain.get_submodule(name.removesuffix(BIAS).replace(".base_layer", ""))
        parameter = getattr(owner, layer.stored.name)
        for adapter in adapters:
            parameter.data[~layer.mask(adapter)] = 0
        written.append(parameter)
    return plain, written


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_those_of_the_base_layer_with_the_masked_weight(name, fields):
    base, x = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name, fields))
    plain, written = with_masks_written(base, model)
    layers = masked_layers(model.base_model.model)
    with_bias = fields == "biases" and getattr(base[0], "bias", None) is not None
    assert len(layers) == len(written) == (2 if name in TARGETS or with_bias else 1)
    assert all((parameter == 0).any() for parameter in written)

    output, expected = model(x), plain(x)
    torch.testing.assert_close(output, expected)
    assert not torch.equal(output, base(x))

    output.square().sum().backward()
    expected.square().sum().backward()
    for layer, parameter in zip(layers.values(), written, strict=True):
        gradient = (parameter.grad * layer.unmerged_weight()).reshape(-1)
        if (positions := layer.positions("default")) is not None:
            gradient = gradient[positions.long()]
        torch.testing.assert_close(layer.peft_mask_scores["default"].grad.reshape(-1), gradient)


@pytest.mark.parametrize("name", CASES)
def test_one_score_may_govern_a_whole_matrix(name):
    base, x = case(name)
    target = TARGETS.get(name, {"target_modules": ["0"]})
    model = get_peft_model(
        copy.deepcopy(base), MaskConfig(**target, binarizer="threshold", candidates=None, structure="matrix")
    )
    plain, written = with_masks_written(base, model)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    layers = masked_layers(model).values()
    for layer, parameter in zip(layers, written, strict=True):
        scores = layer.peft_mask_scores["default"]
        torch.testing.assert_close(scores.grad.sum(), (parameter.grad * layer.unmerged_weight()).sum())
        assert scores.numel() == 1
        scores.data.neg_()
    without, _ = with_masks_written(base, model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), without(x))
        assert not torch.equal(without(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_merging_writes_zeros_and_unmerging_restores_every_bit(name, dtype):
    base, x = case(name, dtype)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config(name), adapter_name="one")
    model.add_adapter("two", config(name, seed=2))
    model.add_adapter("three", config(name, seed=3))
    outputs = {}
    with torch.no_grad():
        for adapter in ("one", "two", "three"):
            model.set_adapter(adapter)
            outputs[adapter] = model(x)
        for adapter in ["two", "three", "two", "one", "two", "one", "three", "one", "three", "two"]:
            model.base_model.switch_adapter(adapter)
            torch.testing.assert_close(model(x), outputs[adapter])
    base = model.unload()
    after = base.state_dict()
    assert list(after) == list(before), "names and their order"
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", CASES)
def test_a_disabled_adapter_is_unmerged(name):
    base, x = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name))
    model.merge_adapter()
    assert all(layer.merged for layer in masked_layers(model).values())
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not any(layer.merged for layer in masked_layers(model).values())


@pytest.mark.parametrize("name", CASES)
def test_a_merged_and_unloaded_model_is_an_ordinary_one(name):
    base, x = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name))
    plain, _ = with_masks_written(base, model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not masked_layers(merged)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    with torch.no_grad():
        assert torch.equal(merged(x), plain(x))


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_comes_back_from_its_file(name, fields, tmp_path):
    base, x = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name, fields))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    masks = Masks.load(tmp_path)
    layers = masked_layers(loaded.base_model.model)
    assert masks.keys() == layers.keys()
    assert all(torch.equal(masks[name], layer.mask("default")) for name, layer in layers.items())
    assert sum(file.stat().st_size for file in Path(tmp_path).glob("*.safetensors")) < 1000


@pytest.mark.parametrize("name", [name for name in CASES if name not in TARGETS])
def test_rows_of_a_batch_have_adapters_of_their_own(name):
    base, x = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name), adapter_name="one").eval()
    model.add_adapter("two", config(name, seed=1))
    with torch.no_grad():
        mixed = model(x, adapter_names=["two", "__base__", "one", "two"])
        for row, adapter in enumerate(["two", None, "one", "two"]):
            if adapter is None:
                expected = base(x)[row]
            else:
                model.set_adapter(adapter)
                expected = model(x)[row]
            torch.testing.assert_close(mixed[row], expected)


@pytest.mark.parametrize("name", TARGETS)
def test_layers_that_cannot_tell_rows_apart_refuse_a_mixed_batch(name):
    base, x = case(name)
    model = get_peft_model(base, config(name), adapter_name="one").eval()
    with pytest.raises(ValueError, match=r"cannot mix adapters in one batch, and it carries \['one'\]"):
        model(x, adapter_names=["one"] * 4)
    with torch.no_grad():
        unmixed = model(x, adapter_names=["__base__"] * 4)
        with model.disable_adapter():
            assert torch.equal(unmixed, model(x))


def test_only_the_rows_that_are_looked_up_are_masked():
    base, x = case("embedding with padding")
    model = get_peft_model(base, config("embedding with padding", "candidates"))
    layer = model.base_model.model[0]
    rows = x.unique()
    table = torch.where(layer.mask("default"), layer.unmerged_weight(), 0)
    assert torch.equal(layer.masked_rows(["default"], rows), table[rows])
    assert layer.masked_rows(["default"], rows[:0]).shape == (0, 6)
    seen = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t)
    with hook:
        model(x)
    assert max(seen) <= max(layer.peft_mask_scores["default"].numel(), len(rows) * 6) < layer.mask_shape.numel()


def test_an_attention_inside_a_fused_encoder_layer_is_masked():
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    model = get_peft_model(
        copy.deepcopy(base), MaskConfig(target_modules=["self_attn"], **FIELDS["all weights"], init_weights=False)
    )
    plain, _ = with_masks_written(base, model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        assert not torch.allclose(model(x), base(x))


def test_the_output_projection_of_an_attention_is_no_default_target_of_its_own():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(image_size=4, patch_size=2, **sizes))
    attention = [name for name, module in base.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attention) == 1
    with pytest.warns(UserWarning, match="reads the weight of its out_proj directly.*target the attention itself"):
        model = get_peft_model(base, MaskConfig())
    targets = model.peft_config["default"].target_modules
    assert not any(name.startswith(attention[0]) for name in targets)
    assert any(name.endswith("q_proj") for name in targets)


def test_what_cannot_be_masked_is_refused_in_words():
    def refuse(module, reason, **fields):
        model = nn.Sequential(nn.Linear(4, 4), module)
        with pytest.raises(ValueError, match=reason):
            get_peft_model(model, MaskConfig(**{"target_modules": ["0", "1"], **fields}))
        assert type(model[0]) is nn.Linear

    refuse(nn.Embedding(4, 4, max_norm=1.0), "'1' of type Embedding is not supported: its max_norm changes the weight")
    refuse(nn.MultiheadAttention(4, 2, kdim=2), "its query, key and value have weights of their own")
    refuse(nn.ConvTranspose2d(2, 2, 2), "'1' of type ConvTranspose2d is not supported: supported are Linear")
    integers = nn.Linear(2, 2)
    integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    refuse(integers, "its weight has dtype torch.int8, which is not floating point")
    refuse(
        Experts(),
        "expected a floating tensor of at least two dim.*got torch.float32 of shape \\(4,\\)",
        target_parameters=["0.bias"],
        target_modules=[],
    )
    refuse(Experts(), "cannot mask the parameter 'weight' of '0'", target_parameters=["0.weight"], target_modules=["0"])


def test_adapters_of_one_model_name_the_same_parameters():
    base, _ = case("experts")
    model = get_peft_model(base, config("experts"))
    with pytest.raises(ValueError, match=r"must name the same target_parameters: 'default' has \['0.down', '0.up'\]"):
        model.add_adapter("other", MaskConfig(target_parameters=["0.up"], target_modules=[]))


@pytest.mark.parametrize("name", CASES)
def test_masks_coded_against_their_base_are_read_with_it(name, tmp_path):
    base, _ = case(name)
    model = get_peft_model(copy.deepcopy(base), config(name, portable=False))
    model.save_pretrained(tmp_path)
    if name == "experts":
        with pytest.raises(ValueError, match=r"'0.*' masks a parameter of Experts whose name its file does not say"):
            Masks.load(tmp_path, base=base)
        return
    masks = Masks.load(tmp_path, base=base)
    layers = masked_layers(model.base_model.model)
    assert all(torch.equal(masks[key], layer.mask("default")) for key, layer in layers.items())


def test_a_weight_is_replaced_where_its_module_looks_it_up():
    module = nn.Linear(2, 2, bias=False)
    module.__dict__["weight"] = module.weight  # as FSDP keeps it
    x, other = torch.randn(3, 2), torch.ones(2, 2)
    before = module(x)
    with StoredWeight(module).replaced_by(other):
        assert torch.equal(module(x), x @ other)
    assert torch.equal(module(x), before)
