"""Mixed batches on vLLM's routing, with layers that are put together as vLLM's are. `test_mixed.py` asks a real one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_mask.vllm import masked_lora
from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.masked_lora import check_engine, fill_slot, holds_masks, masked_output, remember, tell
from peft_mask.vllm.off import Off
from peft_mask.vllm.routing import Tokens
from tests.vllm.pretend import Model, write_checkpoint

QKV, PACKED = "layer.qkv_proj", {"layer.qkv_proj": ["layer.q_proj", "layer.k_proj"]}
SLOTS = [30, None, 10]  # which adapter's id is in which slot


class Layer(nn.Module):
    """One of vLLM's linear layers with room for LoRAs."""

    def __init__(self, base_layer, wrapper):
        super().__init__()
        self.base_layer, self.punica_wrapper = base_layer, wrapper


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    return Checkpoint(tmp_path)


@pytest.fixture
def layers(checkpoint, monkeypatch):
    monkeypatch.setattr(masked_lora, "_check_layer", lambda name, layer: None)  # which looks at vLLM's classes
    model = Model()
    model.load_weights([(name, checkpoint.weight(name)) for name in ("layer.q_proj.weight", "layer.k_proj.weight")])
    return {QKV: Layer(model.layer["qkv_proj"], SimpleNamespace())}


def off(**positions):
    return Off(
        "a", "d", {f"layer.{name}.weight": torch.tensor(own, dtype=torch.int32) for name, own in positions.items()}
    )


def positions_of(adapter, layers, checkpoint):
    return masked_lora.positions_by_layer(adapter, layers, PACKED, checkpoint)


def lora(layers=None, checkpoint=None, adapter=None):
    empty = SimpleNamespace()
    return empty if adapter is None else remember(empty, positions_of(adapter, layers, checkpoint))


def masked(weight, positions):
    return weight.flatten().index_fill(0, positions, 0).view(weight.shape)


def test_positions_of_packed_weights_are_those_of_their_parts_one_after_another(layers, checkpoint):
    found = positions_of(off(q_proj=[0, 47], k_proj=[0, 5]), layers, checkpoint)
    assert found[QKV].tolist() == [0, 47, 48, 53]
    assert positions_of(off(k_proj=[5]), layers, checkpoint)[QKV].tolist() == [53]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_token_gets_the_mask_of_its_slot(layers, checkpoint, dtype, padding):
    layer = layers[QKV]
    layer.base_layer.to(dtype)
    adapters = {30: off(q_proj=[3, 20, 21], k_proj=[7]), 10: off(k_proj=[0, 1, 2])}
    for adapter, own in adapters.items():
        fill_slot(layers, SLOTS.index(adapter), lora(layers, checkpoint, own))
    owners = [10, 0, 30, 30, 10, 0, 77]  # of 77 there is no mask: a LoRA that has no slot, or the base
    tell([layer.punica_wrapper], Tokens(owners, SLOTS))
    x, bias = torch.randn(len(owners) + padding, 6, dtype=dtype), torch.randn(12, dtype=dtype)
    output = masked_output(layer, x, bias)
    weight = layer.base_layer.weight.detach()
    for token, owner in enumerate([*owners, *[0] * padding]):
        none = torch.empty(0, dtype=torch.int64)
        off_here = positions_of(adapters[owner], layers, checkpoint)[QKV] if owner in adapters else none
        expected = x[token].double() @ masked(weight, off_here).double().t() + bias.double()
        torch.testing.assert_close(
            output[token].double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-2
        )
    assert output.dtype == dtype
    three = masked_output(layer, x.unsqueeze(0), bias)
    assert torch.equal(three, output.unsqueeze(0))


def test_a_batch_without_masks_is_left_to_vllm(layers, checkpoint):
    layer, x = layers[QKV], torch.randn(2, 6)
    assert masked_output(layer, x, None) is None  # nobody was told anything
    fill_slot(layers, 0, lora(layers, checkpoint, off(q_proj=[1])))
    tell([layer.punica_wrapper], Tokens([10, 0], SLOTS))
    assert masked_output(layer, x, None) is None
    tell([layer.punica_wrapper], Tokens([30, 0], SLOTS))
    assert masked_output(layer, x, None) is not None


def test_who_takes_a_slot_puts_out_whose_it_was(layers, checkpoint):
    layer, x = layers[QKV], torch.randn(1, 6)
    tell([layer.punica_wrapper], Tokens([30], SLOTS))
    outputs = []
    for adapter in (off(q_proj=list(range(48))), off(k_proj=[3]), None):
        fill_slot(layers, 0, lora(layers, checkpoint, adapter))
        outputs.append(masked_output(layer, x, None))
    assert outputs[0][0, :8].abs().max() < 1e-5
    assert outputs[1][0, :8].abs().min() > 1e-3
    assert outputs[2] is None


def test_loras_are_told_from_masks(layers, checkpoint):
    assert holds_masks(lora(layers, checkpoint, off(q_proj=[])))
    assert not holds_masks(lora())


def test_masks_of_what_is_not_among_the_layers_are_refused_by_name(layers, checkpoint):
    with pytest.raises(ValueError, match=r"it masks \['layer.head.weight'\], and in mixed batches .*\['qkv_proj'\]"):
        positions_of(off(q_proj=[1], head=[2]), layers, checkpoint)


def test_a_layer_that_holds_something_else_than_the_checkpoint_is_refused(layers, checkpoint):
    weight = layers[QKV].base_layer.weight
    weight.data[8, 3] += 1
    with pytest.raises(ValueError, match=r"'layer.k_proj.weight' is not in the model as it is in the base checkpoint"):
        positions_of(off(k_proj=[3]), layers, checkpoint)
    layers[QKV].base_layer.weight = nn.Parameter(torch.empty(0))  # packed, and taken away
    with pytest.raises(ValueError, match=r"'layer.q_proj.weight' is not in the model"):
        positions_of(off(q_proj=[3]), layers, checkpoint)


def engine(**settings):
    model = {"enforce_eager": True, "quantization": None, "is_multimodal_model": False}
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    lora = {"fully_sharded_loras": False}
    parts = ({key: settings.get(key, value) for key, value in part.items()} for part in (model, parallel, lora))
    names = ("model_config", "parallel_config", "lora_config")
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in zip(names, parts, strict=True)})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"enforce_eager": False}, "enforce_eager=True"),
        ({"tensor_parallel_size": 2}, "spread over 2 workers"),
        ({"pipeline_parallel_size": 4}, "spread over 4 workers"),
        ({"quantization": "fp8"}, r"quantized \(fp8\)"),
        ({"is_multimodal_model": True}, "more than text"),
        ({"fully_sharded_loras": True}, "fully_sharded_loras"),
    ],
)
def test_engines_that_masks_cannot_be_mixed_in_are_refused(settings, reason):
    check_engine(engine())
    with pytest.raises(ValueError, match=f"masks cannot be mixed in this engine: .*{reason}"):
        check_engine(engine(**settings))
