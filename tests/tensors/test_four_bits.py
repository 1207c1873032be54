"""What weights of 4 bits take is the same with and without any."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from peft_mask.tensors.four_bits import as_if_quantized, bytes_beside, is_four_bits, kernels_unmentioned

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def linear(device, shape=(100, 70), **kind):
    layer = bnb.nn.Linear4bit(*shape, bias=False, device="meta", **kind)
    if device == "cpu":
        layer.weight = bnb.nn.Params4bit(torch.randn(shape[::-1]), requires_grad=False, **kind).to("cpu")
    return layer


@pytest.mark.parametrize("shape", [(64, 1), (100, 70), (256, 4096), (33, 3)])
@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_takes_what_one_without_values_says(shape, compress_statistics, quant_type):
    kind = {"compress_statistics": compress_statistics, "quant_type": quant_type}
    there, planned = (linear(device, shape, **kind) for device in ("cpu", "meta"))
    assert there.weight.nbytes == -(-shape[0] * shape[1] // 2)
    assert there.weight.nbytes + bytes_beside(there) == planned.weight.nbytes + bytes_beside(planned)
    with as_if_quantized(planned):
        assert there.weight.nbytes + bytes_beside(there) == planned.weight.nbytes + bytes_beside(planned)


def test_only_weights_without_values_are_taken_for_quantized_and_left_as_they_were():
    model = nn.ModuleList([linear("meta"), linear("cpu"), nn.Linear(2, 2)])
    assert [is_four_bits(module) for module in model] == [True, True, False]
    before = model[1].weight.quant_state
    with as_if_quantized(model):
        assert model[0].weight.quant_state.shape == (70, 100)
        assert model[1].weight.quant_state is before
    assert model[0].weight.quant_state is None
    with pytest.raises(RuntimeError, match="of a test"), as_if_quantized(model):
        raise RuntimeError("of a test")
    assert model[0].weight.quant_state is None


@pytest.mark.slow
def test_the_import_says_nothing_of_kernels_and_the_logger_is_then_as_it_was():
    ran = subprocess.run([sys.executable, "-c", "import peft_mask"], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    with kernels_unmentioned():
        assert logger.getEffectiveLevel() == logging.ERROR
    assert logger.level == before
