"""Adapters that were saved once, with task heads, and are to be read for ever: see tests/golden/make.py."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_mask import Masks
from peft_mask.format.mask_file import read_headers
from tests.golden.make import HERE, TRAINED, expected, golden_base, golden_head, trained
from tests.independent_decoder import decode

FILE = "adapter_model.safetensors"
EXPECTED = json.loads((HERE / "expected.json").read_text())
X = (torch.arange(140.0).view(2, 70) % 7 - 3) / 4

adapters = pytest.mark.parametrize("name", EXPECTED)


def mask_of(name, module):
    return torch.tensor([[kept == "1" for kept in row] for row in EXPECTED[name][module]])


@adapters
def test_every_golden_adapter_loads_with_its_masks_and_its_head(name):
    model = PeftModel.from_pretrained(golden_base(), HERE / name).eval()
    for module in EXPECTED[name]:
        layer = model.base_model.model.get_submodule(module)
        assert torch.equal(layer.mask("default"), mask_of(name, module))
    head = model.base_model.model.get_submodule("6").modules_to_save["default"].state_dict()
    assert all(torch.equal(head[key], value) for key, value in golden_head().items())

    by_hand = golden_base()
    with torch.no_grad():
        for module in EXPECTED[name]:
            by_hand.get_submodule(module).weight.masked_fill_(~mask_of(name, module), 0.0)
        by_hand[6].load_state_dict(golden_head())
        torch.testing.assert_close(model(X), by_hand(X))


@adapters
def test_masks_are_read_without_a_model_or_with_its_base_alone(name):
    masks = Masks.load(HERE / name, base=golden_base())
    assert dict(masks.items()).keys() == EXPECTED[name].keys()
    assert all(torch.equal(masks[module], mask_of(name, module)) for module in masks)
    if name == "portable":
        assert Masks.load(HERE / name) == masks


@adapters
def test_the_independent_decoder_reads_them(name):
    base, tensors = golden_base(), load_file(HERE / name / FILE)
    for module in EXPECTED[name]:
        record = tensors[f"base_model.model.{module}.peft_mask_bits"].numpy().tobytes()
        shape, mask, _, _ = decode(record, base.get_submodule(module).weight.flatten().tolist())
        assert torch.equal(torch.tensor(mask).view(shape), mask_of(name, module))


@adapters
def test_saving_gives_the_golden_tensors(name, tmp_path):
    trained(name).save_pretrained(tmp_path)
    golden, saved = load_file(HERE / name / FILE), load_file(tmp_path / FILE)
    assert golden.keys() == saved.keys()
    assert all(torch.equal(golden[key], saved[key]) for key in golden)


def test_they_are_of_every_codec_and_as_the_script_says():
    codecs = {
        name: sorted({header.codec for header, _ in read_headers(HERE / name / FILE).values()}) for name in TRAINED
    }
    assert codecs == {"portable": [0, 1], "coded": [0, 1, 2]}
    assert expected() == EXPECTED
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file() and path.suffix != ".py") < 40_000
