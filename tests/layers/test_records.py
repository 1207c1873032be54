"""Masks that a layer keeps as records: the same bits and the same outputs as masks that it keeps as bits."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask import MaskLayer
from peft_mask.format.fingerprint import fingerprint_of
from peft_mask.format.packing import pack_bits, zero_positions
from peft_mask.format.record import read_record, read_zero_positions, write_record
from tests.served_models import layers_of, served


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d():
    layer = Conv1D(9, 16)
    nn.init.normal_(layer.weight)
    return layer


KINDS = {
    "linear": (lambda: nn.Linear(16, 9), torch.randn(4, 16)),
    "bias": (lambda: nn.Linear(16, 9), torch.randn(4, 16)),
    "conv1d": (conv1d, torch.randn(4, 16)),
    "embedding": (lambda: nn.Embedding(16, 9), torch.randint(0, 16, (4, 5))),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), torch.randn(4, 3, 5, 5)),
}


def masked(kind):
    torch.manual_seed(0)
    make, x = KINDS[kind]
    fields = {"target_modules": ["layer"], "mask_biases": kind == "bias"}
    return served(Net(make()), names=("bits",), **fields), x


def hold(model, of="bits", name="record", base=False):
    for layer in layers_of(model):
        weight = layer.unmerged_weight()
        bits = layer.packed_mask(of)
        layer.hold_record(name, write_record(bits, weight.shape, fingerprint_of(weight), weight if base else None))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_computes_what_the_bits_do(kind, rows, exact):
    model, x = masked(kind)
    hold(model)
    model.base_model.set_exact(exact)
    x = x.repeat_interleave(rows, 0)
    with torch.no_grad():
        batches = [[name, "__base__", name, name] for name in ("bits", "record", "__base__")]
        batches.append(["bits", "__base__", "record", "bits"])
        one, two, base, mixed = (model(x, adapter_names=[n for n in own for _ in range(rows)]) for own in batches)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, mixed)
    assert not torch.allclose(one, base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_a_mask_for_whoever_asks_and_is_in_no_state_dict(kind):
    model, _ = masked(kind)
    before = set(model.state_dict())
    hold(model)
    assert set(model.state_dict()) == before
    for layer in layers_of(model):
        assert layer.available_adapters == {"bits", "record"}
        assert torch.equal(layer.mask("record"), layer.mask("bits"))
        assert torch.equal(layer._zero_positions("record").long(), layer._zero_positions("bits").long())
    again = copy.deepcopy(model)
    for layer in layers_of(again):
        weight = layer.stored.parameter
        assert torch.equal(layer.mask("record"), layer.mask("bits"))
        held = layer.peft_mask_bits._records.get("record")
        assert held is None or held.base() is not layers_of(model)[0].stored.parameter
        assert weight.shape == layer.mask_shape
    for layer in layers_of(model):
        layer.let_go("record")
        layer.let_go("record")  # nothing is there any more
        assert layer.available_adapters == {"bits"}
        assert not layer.peft_mask_bits.holds_record("record")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_another_record_of_the_same_name_is_another_mask(kind):
    model, x = masked(kind)
    hold(model)
    with torch.no_grad():
        model(x, adapter_names=["record"] * 4)
        for layer in layers_of(model):
            bits = pack_bits(~layer.mask("bits"))
            weight = layer.unmerged_weight()
            layer.hold_record("record", write_record(bits, weight.shape, fingerprint_of(weight)))
            layer.peft_mask_bits.fill("bits", bits)
        names = [["bits"] * 4, ["record"] * 4]
        one, two = (model(x, adapter_names=own) for own in names)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_casts_and_changed_weights_reach_what_was_gathered_from_a_record():
    model, x = masked("linear")
    hold(model)
    layer = layers_of(model)[0]

    def same():
        with torch.no_grad():
            one, two = (model(y, adapter_names=[name] * 4) for name in ("bits", "record"))
        torch.testing.assert_close(one, two, rtol=0, atol=0)

    y = x
    same()
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2)
    same()
    model.bfloat16()
    y = x.bfloat16()
    same()
    assert isinstance(layer, MaskLayer)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("base", [False, True])
def test_zeros_are_read_as_from_the_bits(share, base):
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    off = torch.rand(40, 30) < share if share < 1 else torch.ones(40, 30, dtype=torch.bool)
    record = write_record(pack_bits(~off), weight.shape, fingerprint_of(weight), weight if base else None)
    bits = read_record(record, weight.shape, weight).bits
    assert torch.equal(read_zero_positions(record, lambda: weight), zero_positions(bits, weight.shape).long())
