"""Masked operations: closed forms, the readable twin, and what must not happen."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mask.scores.binarize import binarize_threshold
from peft_mask.scores.functional import apply_mask, apply_scores, masked_linear, masked_linear_reference, masked_weight


def make(rows=5, inputs=7, outputs=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    scores = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    return x, weight, scores, bias


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def test_a_score_at_the_threshold_is_kept():
    scores = torch.tensor([-1e-30, -0.0, 0.0, 1e-30, float("nan")])
    assert binarize_threshold(scores).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_off_are_positive_zero_and_the_others_the_same_bits(dtype):
    weight = torch.tensor([-1.0, float("inf"), float("-inf"), float("nan"), -0.0, 2.0], dtype=dtype)
    masked = apply_mask(weight, torch.tensor([False, False, False, False, True, True]))
    assert masked.dtype == dtype
    assert masked.tolist() == [0.0, 0.0, 0.0, 0.0, -0.0, 2.0]
    assert masked.signbit().tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("scores_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_pass_and_two_passes_mask_the_same_bits(weight_dtype, scores_dtype, flush):
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 6e-8, -6e-8, 1e-38, -1.2e-38, 1.0, -1.0, math.inf, -math.inf]
    scores = torch.tensor(edges * 12, dtype=torch.float64).to(scores_dtype).view(12, -1)
    weight = torch.randn(scores.shape, dtype=torch.float64).to(weight_dtype)
    weight[0] = math.inf
    try:
        torch.set_flush_denormal(flush)
        one, two = apply_scores(weight, scores), apply_mask(weight, binarize_threshold(scores))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    assert (binarize_threshold(scores) == (scores >= 0)).logical_or(scores.abs() < 1.2e-38).all()


def test_straight_through_gradient_equals_the_closed_form():
    x, weight, scores, bias = make()
    x, scores, bias = leaves(x, scores, bias)
    y = masked_linear(x, weight, scores, bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    product = upstream.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(scores.grad, product * weight)
    torch.testing.assert_close(x.grad, upstream @ (weight * (scores >= 0)))
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    assert (scores.grad[scores < 0] != 0).all(), "weights that are off must be able to come back"


def test_of_candidates_the_gradient_is_the_closed_form_at_their_positions():
    x, weight, _, bias = make()
    positions = torch.tensor([0, 3, 4, 11, 20], dtype=torch.int32)
    (scores,) = leaves(torch.tensor([-1.0, 1.0, -2.0, 0.0, 3.0]))
    y = masked_linear(x, weight, scores, bias, positions=positions)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    product = upstream.flatten(0, 1).T @ x.flatten(0, 1)
    torch.testing.assert_close(scores.grad, (product * weight).flatten()[positions.long()])


@pytest.mark.parametrize("positions", [None, torch.arange(21)])
def test_the_gradient_that_comes_in_is_left_as_it_is(positions):
    _, weight, scores, _ = make()
    (scores,) = leaves(scores if positions is None else scores.flatten())
    masked = masked_weight(weight, scores, positions=positions)
    upstream = torch.randn_like(masked)
    before = upstream.clone()
    masked.backward(upstream)
    assert torch.equal(upstream, before)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    with_bias=st.booleans(),
    train_weight=st.booleans(),
    train_x=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lean_and_readable_twin_agree_in_value_and_every_gradient(
    rows, inputs, outputs, with_bias, train_weight, train_x, transposed, seed
):
    x, weight, scores, bias = make(rows, inputs, outputs, torch.float64, seed)
    if transposed:  # Conv1D hands over views
        weight, scores = weight.t().contiguous().t(), scores.t().contiguous().t()
    grads = []
    for function in (masked_linear, masked_linear_reference):
        x_, weight_, scores_, bias_ = leaves(x, weight, scores.double(), bias)
        y = function(
            x_ if train_x else x,
            weight_ if train_weight else weight,
            scores_,
            bias_ if with_bias else None,
        )
        y.square().sum().backward()
        grads.append((y.detach(), x_.grad, weight_.grad, scores_.grad, bias_.grad))
    for lean, readable in zip(*grads, strict=True):
        assert (lean is None) == (readable is None)
        if lean is not None:
            torch.testing.assert_close(lean, readable)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("function", [masked_linear, masked_linear_reference])
@pytest.mark.parametrize("shape", [(6, 1), (1, 8), (1, 1), (3, 1), (2, 4), (6, 8)])
def test_a_score_of_a_block_masks_it_whole_and_gets_the_sum_of_its_gradients(shape, function, transposed):
    x, weight, _, bias = make(inputs=8, outputs=6)
    units = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    blocks = [length // count for length, count in zip(weight.shape, shape, strict=True)]
    dense = units.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
    (few, many), grads = leaves(units, dense), []
    for scores, each in ((few, units), (many, dense)):
        for mask in (None, each >= 0.1):
            scores.grad = None
            given = (
                (weight.t(), scores.t(), None if mask is None else mask.t()) if transposed else (weight, scores, mask)
            )
            y = function(x, *given[:2], bias, given[2], transposed=transposed)
            y.square().sum().backward()
            grads.append((y.detach(), scores.grad))
    for (y, grad), (y_dense, grad_dense) in zip(grads[:2], grads[2:], strict=True):
        torch.testing.assert_close(y, y_dense)
        summed = grad_dense.view(shape[0], blocks[0], shape[1], blocks[1]).sum((1, 3))
        torch.testing.assert_close(grad, summed, rtol=1e-4, atol=1e-4)


def test_a_trained_weight_gets_no_gradient_where_it_is_off():
    x, weight, scores, _ = make()
    (weight,) = leaves(weight)
    masked_linear(x, weight, scores).sum().backward()
    assert (weight.grad[scores < 0] == 0).all()
    assert (weight.grad[scores >= 0] != 0).all()


def test_all_ones_mask_equals_the_plain_layer_bit_for_bit():
    x, weight, scores, bias = make()
    assert torch.equal(masked_linear(x, weight, scores.abs(), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_gradients_in_the_dtype_of_the_scores(dtype):
    x, weight, scores, bias = make(dtype=dtype)
    x, scores = leaves(x, scores)
    masked_linear(x, weight, scores, bias).float().sum().backward()
    assert scores.grad.dtype == torch.float32
    assert x.grad.dtype == dtype
    reference = leaves(scores)[0]
    masked_linear_reference(x.float(), weight.float(), reference, bias.float()).sum().backward()
    torch.testing.assert_close(scores.grad, reference.grad, rtol=0.02, atol=0.02)


def test_autocast_computes_in_bfloat16_and_returns_gradients_in_float32():
    x, weight, scores, bias = make()
    x, scores = leaves(x, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, weight, scores, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == scores.grad.dtype == torch.float32
    assert scores.grad.isfinite().all()


def test_nothing_of_the_weights_size_is_kept_for_backward():
    x, weight, scores, bias = make()
    (scores,) = leaves(scores)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        masked_linear(x, weight, scores, bias)
    assert set(saved) <= {x.data_ptr(), weight.data_ptr(), scores.data_ptr()}


@pytest.mark.parametrize("function", [masked_linear, masked_weight])
def test_double_backward_is_refused(function):
    x, weight, scores, _ = make()
    (scores,) = leaves(scores)
    y = masked_weight(weight, scores) if function is masked_weight else masked_linear(x, weight, scores)
    (grad,) = torch.autograd.grad(y.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Dynamo makes an instance of every autograd function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks():
    x, weight, scores, bias = make()
    (scores,) = leaves(scores)
    compiled = torch.compile(masked_linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, weight, scores, bias)
    torch.testing.assert_close(y, masked_linear(x, weight, scores, bias))
    y.sum().backward()
    expected = leaves(scores)[0]
    masked_linear(x, weight, expected, bias).sum().backward()
    torch.testing.assert_close(scores.grad, expected.grad)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_a_masked_linear_layer_may_be_changed_in_place(shape, bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(5, 4), torch.randn(5) if bias else None
    gradients = []
    for function in (masked_linear, masked_linear_reference):
        scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        function(x, weight, scores, bias).mul_(2).relu_().sum().backward()
        gradients.append(scores.grad)
    torch.testing.assert_close(*gradients)
