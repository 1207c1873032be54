"""Scores that learn from a part of the tokens."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig
from peft_mask.scores.drawn_tokens import LEAST, drawn_tokens
from peft_mask.scores.functional import masked_linear


def test_large_terms_are_always_drawn_and_small_ones_stand_for_others():
    torch.manual_seed(0)
    grads, inputs = torch.randn(8 * LEAST, 3) / 1000, torch.randn(8 * LEAST, 2)
    large = torch.arange(1, 8 * LEAST, 16)  # fewer than are drawn
    grads[large] *= 1000_000
    drawn, their_inputs = drawn_tokens(grads, inputs, 0.25)
    assert len(drawn) == len(their_inputs) == 2 * LEAST
    at = [int((inputs == row).all(1).nonzero()[0]) for row in their_inputs]
    assert at == sorted(set(at))
    assert set(large.tolist()) < set(at)
    counted = (drawn / grads[at]).mean(1)
    is_large = torch.isin(torch.tensor(at), large)
    torch.testing.assert_close(counted[is_large], torch.ones(len(large)))
    assert (counted[~is_large] > 1).all()


def test_the_product_is_that_of_all_tokens_on_average():
    torch.manual_seed(0)
    scale = torch.randn(4 * LEAST, 1).exp()
    inputs = torch.randn(4 * LEAST, 2) + 1
    total = torch.zeros(3, 2, dtype=torch.float64)
    draws = 1000
    grads = torch.randn(4 * LEAST, 3) * scale + 0.5
    for number in range(draws):
        jitter = 1 + 1e-4 * number / draws  # which draws other numbers
        rows, columns = drawn_tokens(grads * jitter, inputs, 0.25)
        total += rows.double().t() @ columns.double() / jitter
    torch.testing.assert_close(total / draws, grads.double().t() @ inputs.double(), rtol=0.03, atol=1.0)


@pytest.mark.parametrize(("tokens", "share", "chosen"), [(10, 0.1, 10), (LEAST + 1, 0.1, LEAST), (3000, 0.25, 750)])
def test_so_many_are_drawn_and_never_too_few_to_tell(tokens, share, chosen):
    grads, inputs = drawn_tokens(torch.randn(tokens, 3), torch.randn(tokens, 2), share)
    assert len(grads) == len(inputs) == chosen


def test_a_gradient_that_is_not_finite_is_always_among_those_drawn():
    for value in (torch.nan, torch.inf):
        grads = torch.ones(2 * LEAST, 2)
        grads[17, 1] = value
        assert not drawn_tokens(grads, torch.ones(2 * LEAST, 3), 0.1)[0].isfinite().all()


def test_tokens_without_a_gradient_are_left_out_and_nothing_is_lost():
    torch.manual_seed(0)
    x, weight = torch.randn(4 * LEAST, 6), torch.randn(5, 6)
    scores = [torch.zeros(5, 6, requires_grad=True) for _ in range(2)]
    for each, share in zip(scores, (1.0, 0.25), strict=True):
        masked_linear(x, weight, each, tokens=share)[-LEAST:].square().sum().backward()
    torch.testing.assert_close(scores[0].grad, scores[1].grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_that_of_the_chosen_tokens_and_other_gradients_are_of_all(transposed):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 2 * LEAST, 6, requires_grad=True), torch.randn(5, 6)
    scores, bias = torch.zeros(5, 6, requires_grad=True), torch.zeros(5, requires_grad=True)
    if transposed:
        weight, scores = weight.t().contiguous(), torch.zeros(6, 5, requires_grad=True)
    grad = torch.randn(2, 2 * LEAST, 5)
    expected = torch.autograd.grad(masked_linear(x, weight, scores, bias, transposed=transposed), (x, bias), grad)
    found = torch.autograd.grad(
        masked_linear(x, weight, scores, bias, transposed=transposed, tokens=0.5), (x, bias, scores), grad
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=False))
    chosen, inputs = drawn_tokens(grad.view(-1, 5), x.detach().view(-1, 6), 0.5)
    product = inputs.t() @ chosen if transposed else chosen.t() @ inputs
    torch.testing.assert_close(found[2], product * weight)


def test_a_weight_that_is_trained_itself_has_its_gradient_of_all_tokens():
    torch.manual_seed(0)
    x, weight = torch.randn(4 * LEAST, 6), torch.randn(5, 6, requires_grad=True)
    scores = torch.ones(5, 6)
    gradients = [
        torch.autograd.grad(masked_linear(x, weight, scores, tokens=share).square().sum(), weight)[0]
        for share in (1.0, 0.25)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("training", [True, False])
def test_layers_leave_tokens_out_in_training_alone(training):
    torch.manual_seed(0)
    x, gradients = torch.randn(4 * LEAST, 6), []
    for share in (1.0, 0.25):
        torch.manual_seed(0)
        config = MaskConfig(target_modules=["0"], gradient_tokens=share, seed=0)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).train(training)
        model(x).square().sum().backward()
        gradients += [p.grad for name, p in model.named_parameters() if "peft_mask_scores" in name]
    assert torch.equal(*gradients) != training
