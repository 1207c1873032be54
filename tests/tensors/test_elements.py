"""Elements at positions; what is written with them, in training and by merging, has to be the same in any order."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig
from peft_mask.tensors.elements import put, take
from tests.scores.test_binarizers import BINARIZERS, layers, masked, train

LAYOUTS = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.t(),
    "every second column": lambda base: base[:, ::2],
    "channels last": lambda base: base.view(2, 3, 2, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int8", "uint8"])
def test_positions_are_row_major_in_any_layout(layout, dtype):
    tensor = LAYOUTS[layout](torch.arange(24).view(4, 6).to(getattr(torch, dtype)))
    address, order = tensor.data_ptr(), tensor.flatten().clone()
    positions = torch.tensor([7, 0, 11])
    assert torch.equal(take(tensor, positions), order[positions])
    new = torch.tensor([50, 51, 52]).to(tensor.dtype)
    put(tensor, positions, new)
    order[positions] = new
    assert torch.equal(tensor.flatten(), order)
    assert tensor.data_ptr() == address


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_every_bit_of_an_element_is_read_and_written(layout, dtype):
    size = getattr(torch, dtype).itemsize
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    patterns = torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1), (24,)).to(integers)
    patterns[:3] = torch.tensor([-1, -2, 2 ** (8 * size - 1) - 1]).to(integers)  # NaN, of which there are many
    tensor = LAYOUTS[layout](torch.zeros(4, 6, dtype=integers)).view(getattr(torch, dtype))
    positions = torch.arange(12)
    put(tensor, positions, patterns[:12].view(tensor.dtype))
    assert torch.equal(take(tensor, positions).view(integers), patterns[:12])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:every weight of")  # where a unit is a matrix
@pytest.mark.parametrize("name", BINARIZERS)
def test_deterministic_algorithms_suffice_for_training_and_merging(name, tmp_path):
    model = train(masked(name))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "saved")
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter(["saved"])
    assert any(not torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model).items())


def test_a_weight_of_any_layout_is_masked_and_merged_alike():
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(torch.randn(6, 4).t())
    model = get_peft_model(
        nn.Sequential(base), MaskConfig(target_modules=["0"], init_weights=False, target_sparsity=0.1)
    )
    x, before = torch.randn(3, 6), base.weight.detach().clone()
    masked = model(x)
    model.merge_adapter()
    assert not torch.equal(base.weight, before)
    assert torch.allclose(model(x), masked)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)
