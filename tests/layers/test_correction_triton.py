"""The Triton kernel of the sparse correction: its values by Triton's interpreter, and whether it compiles for GPUs.

`make triton` runs it: triton takes 700 MB, and has to know when it is imported that it is to interpret.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_mask
from peft_mask.layers import correction, serving
from peft_mask.layers.correction import Zeros, correct, correct_reference, zeros_of
from tests.served_models import served

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs triton and TRITON_INTERPRET=1: `make triton` sees to both", allow_module_level=True)

from peft_mask.layers import correction_triton

OUT, WIDTH = 37, 67
# Triton's interpreter cuts floats off where a GPU rounds them to bfloat16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FIELDS = ("pointers", "columns", "values", "places")


@pytest.fixture(autouse=True)
def _devices_keep_wide_places(monkeypatch):
    monkeypatch.setattr(correction, "_index_dtype", lambda *_: torch.int32)


@pytest.fixture(autouse=True)
def _memory_is_not_zero_by_chance(deterministic):
    """PyTorch then fills new memory with NaN."""
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()


@pytest.fixture
def asked_for():
    """As after `use_triton()` on a GPU, but for tensors of the CPU."""
    with torch.library._scoped_library("peft_mask", "FRAGMENT") as library:
        library.impl("correction", correction._as_asked_for, "CPU")
        correction._asked_for["cpu"] = correction_triton.correction
        yield
        del correction._asked_for["cpu"]


@pytest.fixture
def launches(monkeypatch):
    """The grids of the kernel's launches."""
    grids, kernel = [], correction_triton._kernel

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(correction_triton, "_kernel", Recorded())
    return grids


def uneven_zeros(count, dtype=torch.float32):
    """The zeros of some masks, and each as a matrix: some outputs have lost no weight, others most of theirs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, WIDTH, generator=generator).to(dtype)
    share = torch.linspace(-0.2, 0.8, OUT)[torch.randperm(OUT, generator=generator)].unsqueeze(1)
    off = torch.rand(count, OUT, WIDTH, generator=generator) < share
    zeros = [zeros_of(mask.view(-1).nonzero().squeeze(1), weight) for mask in off]
    for own in zeros:
        counts = own.pointers.diff()
        assert counts[0] == 0 < counts[-1]
        assert counts.max() > correction_triton._ZEROS, "more than a program takes in a step"
        assert not torch.equal(own.places, torch.arange(OUT)), "outputs stand in another order"
    return zeros, torch.where(off, weight, 0)


def by_triton(x, sizes, zeros):
    return correction_triton.correction(x, sizes, *([getattr(own, field) for own in zeros] for field in FIELDS))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("none", [0, 3, 20])
@pytest.mark.parametrize(
    "sizes", [[1] * 5, [3, 20, 1, 33], [0, 2, 0, 1, 0], [2], [16, 15, 17], [0, 0], [70, 1]], ids=str
)
def test_each_token_is_corrected_by_its_own_adapter(dtype, sizes, none):
    zeros, matrices = uneven_zeros(len(sizes), dtype)
    x = torch.randn(sum(sizes) + none, WIDTH).to(dtype)
    found = by_triton(x, sizes, zeros)
    assert found.dtype == dtype
    assert found.shape == (len(x), OUT)
    owners = torch.repeat_interleave(torch.tensor(sizes))
    expected = torch.einsum("tow,tw->to", matrices[owners].double(), x[: len(owners)].double())
    for own, other in pairwise(matrices):
        assert not torch.equal(own, other)
    torch.testing.assert_close(found[: len(owners)].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(found, correct_reference(x, sizes, zeros), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not found[len(owners) :].any()


def test_groups_of_every_size_are_corrected():
    sizes = list(range(34))
    zeros, _ = uneven_zeros(len(sizes))
    x = torch.randn(sum(sizes), WIDTH)
    torch.testing.assert_close(by_triton(x, sizes, zeros), correct_reference(x, sizes, zeros), rtol=1e-5, atol=1e-5)


def test_a_mask_that_keeps_everything_corrects_nothing():
    weight = torch.randn(OUT, WIDTH)
    zeros = [zeros_of(torch.arange(count), weight) for count in (0, 5)]
    found = by_triton(torch.randn(5, WIDTH), [3, 2], zeros)
    assert not found[:3].any()
    assert torch.equal(found[3:] != 0, torch.arange(OUT).expand(2, -1) == 0)


def test_inputs_past_what_16_bits_count_are_found():
    weight = torch.randn(2, 70_000)
    zeros = [zeros_of(torch.tensor(positions), weight) for positions in ([32_768, 69_999], [40_000, 70_001, 139_999])]
    x = torch.randn(5, 70_000)
    for sizes in ([1, 1], [2, 3]):
        expected = correct_reference(x, sizes, zeros)
        assert expected[0, 0] != 0
        torch.testing.assert_close(by_triton(x, sizes, zeros), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1], [3]])
def test_a_sum_of_16_bits_is_rounded_once(dtype, sizes):
    weight = torch.rand(8, 512).to(dtype)
    x = torch.ones(sum(sizes), 512, dtype=dtype)
    found = by_triton(x, sizes, [zeros_of(torch.arange(8 * 512), weight)])
    exact = weight.double().sum(1).expand(len(x), -1)
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 3]])
def test_inputs_need_not_stand_together_in_memory(sizes):
    zeros, _ = uneven_zeros(2)
    apart = torch.randn(WIDTH, 3 * sum(sizes)).t()[::3]
    assert torch.equal(by_triton(apart, sizes, zeros), by_triton(apart.contiguous(), sizes, zeros))


def test_a_default_device_is_not_asked():
    zeros, _ = uneven_zeros(2)
    x = torch.randn(3, WIDTH)
    with torch.device("meta"):
        found = by_triton(x, [1, 2], zeros)
    torch.testing.assert_close(found, correct_reference(x, [1, 2], zeros), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1], [2]])
def test_an_infinite_input_reaches_the_outputs_that_have_lost_a_weight_of_it_and_no_other(sizes):
    zeros, matrices = uneven_zeros(1)
    x = torch.ones(sum(sizes), WIDTH)
    x[0, 0] = torch.inf  # where masked loads would point to
    found = by_triton(x, sizes, zeros)
    assert torch.equal(found[0].isfinite(), matrices[0][:, 0] == 0)
    assert not found[0].isfinite().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("sizes", [[1] * 6, [1, 0, 2, 33, 9, 5]])
def test_all_adapters_take_one_launch(sizes, launches):
    zeros, _ = uneven_zeros(6)
    by_triton(torch.randn(sum(sizes) + 2, WIDTH), sizes, zeros)
    assert len(launches) == 1


def test_a_batch_without_tokens_is_not_launched(launches):
    zeros, _ = uneven_zeros(2)
    assert by_triton(torch.zeros(0, WIDTH), [0, 0], zeros).shape == (0, OUT)
    assert launches == []


def test_tensors_that_the_kernel_would_misread_are_refused():
    (zeros,), _ = uneven_zeros(1)
    x = torch.randn(1, WIDTH)
    narrow = Zeros(zeros.pointers, zeros.columns.short(), zeros.values, zeros.places)
    with pytest.raises(TypeError, match=r"expects columns of torch.int32 on cpu.*int16"):
        by_triton(x, [1], [narrow])
    with pytest.raises(TypeError, match=r"expects values of torch.bfloat16 on cpu.*float32"):
        by_triton(x.bfloat16(), [1], [zeros])
    elsewhere = Zeros(zeros.pointers, zeros.columns, zeros.values, zeros.places.to("meta"))
    with pytest.raises(TypeError, match=r"expects places of torch.int32 on cpu.*meta"):
        by_triton(x, [1], [elsewhere])


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("sizes", [[1, 1], [1, 3]])
def test_the_gradient_is_that_of_the_twin(sizes, launches):
    zeros, _ = uneven_zeros(2, torch.float64)
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, OUT, dtype=torch.float64)
    outputs = [function(x, sizes, zeros) for function in (correct, correct_reference)]
    assert len(launches) == 1
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad((output * weights).sum(), x)[0] for output in outputs))


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operator_is_what_pytorch_asks_of_one(requires_grad):
    zeros, _ = uneven_zeros(2)
    x = torch.randn(4, WIDTH, requires_grad=requires_grad)
    lists = [[getattr(own, field) for own in zeros] for field in FIELDS]
    torch.library.opcheck(torch.ops.peft_mask.correction.default, (x, [1, 2], *lists))


def test_it_is_used_on_cuda_from_when_it_is_asked_for_until_it_is_not():
    assert "cuda" not in correction._asked_for
    peft_mask.use_triton()
    assert correction._asked_for == {"cuda": correction_triton.correction}
    peft_mask.use_triton(False)
    assert correction._asked_for == {}


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("sizes", [[1, 1], [1, 0], [2, 1]])
def test_it_computes_whatever_the_sizes(sizes, launches):
    zeros, _ = uneven_zeros(2)
    x = torch.randn(sum(sizes), WIDTH)
    torch.testing.assert_close(correct(x, sizes, zeros), correct_reference(x, sizes, zeros), rtol=1e-5, atol=1e-5)
    assert len(launches) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_corrects_few_tokens_by_it_and_patches_for_many(mode, launches, request):
    base = nn.Sequential(nn.Linear(WIDTH, OUT)).eval()
    model = served(copy.deepcopy(base), target_modules=["0"])
    names = ["two", "__base__", "one", "two", "two"]
    inputs = [torch.randn(5, WIDTH), torch.randn(5, 3, WIDTH), torch.randn(5, serving.WIDE, WIDTH)]
    with mode():
        expected = [model(x, adapter_names=names) for x in inputs]
        assert launches == []
        request.getfixturevalue("asked_for")
        for x, bags, most in zip(inputs, expected, (1, 1, 0), strict=True):
            assert not torch.allclose(bags, base(x), atol=1e-2)
            launches.clear()
            torch.testing.assert_close(model(x, adapter_names=names), bags, rtol=1e-5, atol=1e-5)
            assert len(launches) == most


COMPILED = """
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_mask.layers.correction_triton import _OUTPUTS, _ZEROS, _kernel

for architecture in (80, 90):
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        for tokens in (1, 4, 16):
            types = {"y": f"*{dtype}", "x": f"*{dtype}", "table": "*i64", "outputs": "i32", "to_token": "i32"}
            types |= {"to_column": "i32"}
            fixed = {"TOKENS": tokens, "OUTPUTS": _OUTPUTS, "ZEROS": _ZEROS, "DOUBLE": dtype == "fp64"}
            if tokens > 1:  # transposed: those of a column stand together
                fixed["to_token"] = 1
            source = ASTSource(_kernel, types | dict.fromkeys(fixed, "constexpr"), fixed)
            code = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm
            assert dtype != "bf16" or "cvt.rn.bf16" in code["ptx"], "rounded, not cut off"
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(code["cubin"])
                file.flush()
                dump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
                used = subprocess.run(dump, capture_output=True, text=True, check=True).stdout.split()
            registers, *spilled = (word for word in used if word.startswith(("REG:", "STACK:", "LOCAL:")))
            assert spilled == ["STACK:0", "LOCAL:0"]
            print(architecture, dtype, tokens, registers)
"""


def test_it_compiles_for_gpus(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2 * 4 * 3
