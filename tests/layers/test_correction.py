"""What the weights that are off would have added, against the product with a matrix of them."""

import sys

import pytest
import torch

import peft_mask
from peft_mask.layers import correction
from peft_mask.layers.correction import correct, correct_reference, zeros_of

OUT, WIDTH = 13, 9
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def some_zeros(count, dtype=torch.float32, transposed=False, share=0.2, seed=0):
    """The zeros of some masks, and each as a matrix (out, in) of the weights that are off."""
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH, OUT) if transposed else (OUT, WIDTH)
    weight = torch.randn(shape, generator=generator).to(dtype)
    off = torch.rand(count, *shape, generator=generator) < share
    zeros = [zeros_of(mask.view(-1).nonzero().squeeze(1).int(), weight, transposed=transposed) for mask in off]
    matrices = [torch.where(mask, weight, 0) for mask in off]
    return zeros, [matrix.t() if transposed else matrix for matrix in matrices]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_zeros_are_the_weights_that_are_off(transposed, share):
    zeros, matrices = some_zeros(3, transposed=transposed, share=share)
    for own, matrix in zip(zeros, matrices, strict=True):
        assert torch.equal(own.to_dense(WIDTH), matrix)
        assert len(own.values) == len(own.columns) == own.pointers[-1]
        counts = own.pointers.diff()
        assert torch.equal(counts, counts.sort().values), "outputs with equally many stand together"


@pytest.fixture(params=["as installed", "without scipy"])
def backend(request, monkeypatch):
    if request.param == "without scipy":
        monkeypatch.setattr(correction, "compiled_product", lambda: None)
    else:
        assert correction.compiled_product() is not None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 1, 4, 2], [3], [70, 1], [0, 2]])
@pytest.mark.parametrize("none", [0, 3])
def test_each_token_is_corrected_by_its_own_adapter(dtype, sizes, none):
    zeros, matrices = some_zeros(len(sizes), dtype)
    x = torch.randn(sum(sizes) + none, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    owners = torch.repeat_interleave(torch.tensor(sizes)).tolist()
    found = correct(x, sizes, zeros)
    assert found.shape == (len(x), OUT)
    assert found.dtype == dtype
    for token, owner in enumerate(owners):
        expected = matrices[owner].double() @ x[token].double()
        torch.testing.assert_close(found[token].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not found[len(owners) :].any()
    torch.testing.assert_close(found, correct_reference(x, sizes, zeros), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [[1, 1], [1, 3]])
def test_the_gradient_is_that_of_the_twin(sizes):
    zeros, _ = some_zeros(2, torch.float64)
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, OUT, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((function(x, sizes, zeros) * weights).sum(), x)[0]
        for function in (correct, correct_reference)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0][: sum(sizes)].any()
    assert not gradients[0][sum(sizes) :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_16_bits_is_rounded_once(dtype):
    torch.manual_seed(0)
    zeros = [zeros_of(torch.arange(512 * 8), torch.rand(512, 8).to(dtype))]
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    correct(x, [3], zeros).sum().backward()
    exact = zeros[0].to_dense(8).double().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operator_is_what_pytorch_asks_of_one(requires_grad):
    zeros, _ = some_zeros(2)
    x = torch.randn(4, WIDTH, requires_grad=requires_grad)
    lists = [[getattr(own, name) for own in zeros] for name in ("pointers", "columns", "values", "places")]
    torch.library.opcheck(torch.ops.peft_mask.correction.default, (x, [1, 2], *lists))


@pytest.mark.usefixtures("backend")
def test_an_infinite_input_reaches_the_outputs_that_have_lost_a_weight_of_it_and_no_other():
    zeros, matrices = some_zeros(1)
    x = torch.ones(1, WIDTH)
    x[0, 2] = torch.inf
    found = correct(x, [1], zeros)[0]
    assert torch.equal(found.isfinite(), matrices[0][:, 2] == 0)
    assert not found.isfinite().all()


def test_who_asks_for_triton_without_having_it_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "peft_mask.layers.correction_triton", raising=False)
    monkeypatch.delattr("peft_mask.layers.correction_triton", raising=False)
    with pytest.raises(ImportError, match=r"use_triton\(\) needs the package triton.*pip install triton"):
        peft_mask.use_triton()
    peft_mask.use_triton(False)


def test_on_cuda_what_was_asked_for_computes_and_else_as_in_a_captured_graph_the_bags(monkeypatch):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("peft_mask::correction", "CUDA")
    zeros, _ = some_zeros(2)
    lists = [[getattr(own, name) for own in zeros] for name in ("pointers", "columns", "values", "places")]
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(correction._as_asked_for(x, [1, 1], *lists), correct_reference(x, [1, 1], zeros))
    monkeypatch.setitem(correction._asked_for, "cpu", lambda x, sizes, *lists: x.new_full((len(x), OUT), 7))
    assert correction._as_asked_for(x, [1, 1], *lists).eq(7).all()
    with monkeypatch.context() as capturing:
        for state in ("is_initialized", "is_current_stream_capturing"):
            capturing.setattr(torch.cuda, state, lambda: True)
        captured = correction._as_asked_for(x, [1, 1], *lists)
    torch.testing.assert_close(captured, correct_reference(x, [1, 1], zeros))
    peft_mask.use_triton(False)  # of CUDA devices alone
    assert "cpu" in correction._asked_for
