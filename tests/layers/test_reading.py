"""Models that read a layer's weight instead of calling it find the weight that the layer computes with."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

from peft_mask import MaskConfig
from tests.layers.test_modules import Experts, masked_layers

FIELDS = {
    "candidates": {"target_sparsity": 0.05},
    "all weights": {"target_sparsity": 0.3, "candidates": None},
    "threshold": {"binarizer": "threshold", "candidates": None, "init_sparsity": 0.3},
    "biases": {"target_sparsity": 0.3, "candidates": None, "mask_biases": True},
}


class Called(nn.Module):
    """A model that calls its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 8)
        self.first = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.experts = Experts()
        nn.init.normal_(self.first.bias)

    def forward(self, rows):
        x = self.first(self.table(rows))
        x = self.conv(x.unsqueeze(2)).squeeze(2)
        return torch.einsum("bi,eoi->beo", x, self.experts.up).sum(1)


class Read(Called):
    """The same one, past its layers."""

    def forward(self, rows):
        assert self.first.weight.dtype is self.first.bias.dtype is torch.float32
        x = F.linear(self.table.weight[rows], self.first.weight, self.first.bias)
        x = F.conv1d(x.unsqueeze(2), self.conv.weight, self.conv.bias).squeeze(2)
        return torch.einsum("bi,eoi->beo", x, self.experts.up).sum(1)


ROWS = torch.tensor([1, 4, 4])


def config(fields="candidates", seed=0, **more):
    return MaskConfig(
        target_modules=["table", "first", "conv"],
        target_parameters=["experts.up"],
        init_weights=False,
        seed=seed,
        **FIELDS[fields],
        **more,
    )


@pytest.mark.parametrize("fields", FIELDS)
def test_weights_that_are_read_are_masked_and_get_their_gradients(fields, tmp_path):
    read, called = get_peft_model(Read(), config(fields)), get_peft_model(Called(), config(fields))
    torch.testing.assert_close(read(ROWS), called(ROWS))
    for model in (read, called):
        model(ROWS).square().sum().backward()
    for ours, theirs in zip(masked_layers(read).values(), masked_layers(called).values(), strict=True):
        torch.testing.assert_close(ours.peft_mask_scores["default"].grad, theirs.peft_mask_scores["default"].grad)
        assert ours.peft_mask_scores["default"].grad is not None
    read.save_pretrained(tmp_path)
    with torch.no_grad():
        masked = read.eval()(ROWS)
        loaded = PeftModel.from_pretrained(Read(), tmp_path)
        assert torch.equal(loaded(ROWS), masked)
        assert not torch.equal(Read()(ROWS), masked)
        with loaded.disable_adapter():
            assert torch.equal(loaded(ROWS), Read()(ROWS))
        loaded.merge_adapter()
        assert torch.equal(loaded(ROWS), masked)
        with loaded.disable_adapter():
            assert torch.equal(loaded(ROWS), Read()(ROWS))
        assert torch.equal(read.merge_and_unload()(ROWS), masked)


def test_a_fresh_adapter_reads_the_base():
    model = get_peft_model(Read(), MaskConfig(target_modules=["table", "first", "conv"]))
    assert torch.equal(model(ROWS), Read()(ROWS))
    layer = model.base_model.model.first
    assert torch.equal(layer.weight, layer.base_layer.weight)


def test_in_a_batch_of_several_adapters_a_weight_can_be_asked_for_its_dtype_and_no_more():
    model = get_peft_model(Read(), MaskConfig(target_modules=["first"], init_weights=False), adapter_name="one")
    model.add_adapter("two", MaskConfig(target_modules=["first"], init_weights=False, seed=2))
    model.eval()
    seen = []
    model.base_model.model.table.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"cannot mix adapters in one batch: .* one for each of \['one', 'two'\]"):
        model(ROWS, adapter_names=["one", "two", "one"])
    hook = model.base_model.model.register_forward_pre_hook(
        lambda module, args: seen.append((module.first.weight.dtype, module.first.weight.shape, module.first.weight))
    )
    with pytest.raises(ValueError, match="cannot mix adapters"):
        model(ROWS, adapter_names=["one", "__base__", "one"])
    hook.remove()
    dtype, shape, weight = seen[0]
    assert (dtype, tuple(shape)) == (torch.float32, (8, 8))
    assert isinstance(weight, torch.Tensor)
    for compute in (lambda: F.linear(torch.randn(2, 8), weight), weight.sum, weight.detach, lambda: weight[0]):
        with pytest.raises(ValueError, match="cannot mix adapters"):
            compute()

    with torch.no_grad():
        for names, adapter in ((["two"] * 3, "two"), (["__base__"] * 3, None)):
            output = model(ROWS, adapter_names=names)
            model.set_adapter(adapter or "one")
            if adapter is None:
                assert torch.equal(output, Read()(ROWS))
            else:
                assert torch.equal(output, model(ROWS))


def test_a_mask_that_was_not_loaded_can_be_asked_for_its_dtype_and_no_more():
    model = get_peft_model(Read(), MaskConfig(target_modules=["first"], inference_mode=True))
    weight = model.base_model.model.first.weight
    assert weight.dtype is torch.float32
    with pytest.raises(ValueError, match=r"the adapter 'default' has no mask for 'first': nothing was loaded for it"):
        model(ROWS)


@pytest.mark.parametrize("target", [["linear1"], ["linear2"], ["linear1", "linear2", "self_attn"]], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_fused_encoder_layer_is_masked(target, training):
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).train(training)
    x = torch.randn(2, 3, 8)
    model = get_peft_model(
        copy.deepcopy(base), MaskConfig(target_modules=target, target_sparsity=0.3, candidates=None, init_weights=False)
    ).train(training)
    model(x).square().sum().backward()
    assert all(layer.peft_mask_scores["default"].grad.any() for layer in masked_layers(model).values())
    with torch.no_grad():
        masked = model(x)
        assert not torch.allclose(masked, base(x))
        model.merge_adapter()
        torch.testing.assert_close(model(x), masked)


def test_other_attributes_of_a_stand_in_are_its_base_layers():
    model = get_peft_model(Read(), config())
    experts = model.base_model.model.experts
    assert experts.down is experts.get_base_layer().down
    assert not torch.equal(experts.up, experts.get_base_layer().up)
    assert not hasattr(experts, "weight")


def test_weights_that_rwkv_would_rescale_in_place_are_left_out_or_refused():
    def model(**fields):
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "attention_hidden_size": 16}
        return RwkvForCausalLM(RwkvConfig(**sizes, intermediate_size=32, context_length=8, **fields)).eval()

    ids = torch.arange(8).view(1, 8)
    mask = {"binarizer": "threshold", "candidates": None, "init_weights": False, "init_sparsity": 0.3}
    for base, expected in ((model(rescale_every=2), 20), (model(rescale_every=0), 28)):
        with pytest.warns(match="RWKV rescales its weight in place") if expected == 20 else nullcontext():
            masked = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM", **mask)).eval()
        assert len(masked_layers(masked)) == expected
        with torch.no_grad():
            logits = masked(input_ids=ids).logits
            masked.merge_adapter()
            assert torch.equal(masked(input_ids=ids).logits, logits)
    with pytest.raises(ValueError, match=r"cannot mask 'rwkv.blocks.0.attention.output': RWKV rescales its weight in"):
        get_peft_model(model(), MaskConfig(target_modules=["attention.output"]))


@pytest.mark.parametrize("fields", [{}, {"candidates": None}, {"binarizer": "threshold", "candidates": None}])
def test_a_layer_whose_scores_are_yet_to_be_loaded_says_what_its_weight_is_like(fields):
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "first": nn.Linear(8, 8)})
    inject_adapter_in_model(MaskConfig(target_modules=["attention", "first"], **fields), base, low_cpu_mem_usage=True)
    assert (base["first"].weight.dtype, base["first"].weight.device.type) == (torch.float32, "cpu")
    with pytest.raises(ValueError, match="have no scores yet"):
        base["first"].weight + 1
