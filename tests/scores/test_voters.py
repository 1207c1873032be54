"""Scores that learn from the tokens with the largest terms of their gradient."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig
from peft_mask.scores.functional import masked_linear
from peft_mask.scores.voters import LEAST, telling_tokens


def test_the_tokens_with_the_largest_terms_are_chosen_in_their_order():
    grads = torch.ones(4 * LEAST, 3)
    inputs = torch.ones(4 * LEAST, 2)
    largest = torch.arange(1, 4 * LEAST, 2)[-LEAST:]  # one large by its gradient, the next by its input
    grads[largest[::2]] *= 9
    inputs[largest[1::2]] *= 9
    for few in (0.01, 0.25):
        chosen, their_inputs = telling_tokens(grads, inputs, few)
        assert torch.equal(chosen, grads[largest])
        assert torch.equal(their_inputs, inputs[largest])


@pytest.mark.parametrize(("tokens", "share", "chosen"), [(10, 0.1, 10), (LEAST + 1, 0.1, LEAST), (3000, 0.25, 750)])
def test_so_many_are_chosen_and_never_too_few_to_tell(tokens, share, chosen):
    grads, inputs = telling_tokens(torch.randn(tokens, 3), torch.randn(tokens, 2), share)
    assert len(grads) == len(inputs) == chosen


def test_a_gradient_that_is_not_finite_is_always_among_them():
    for value in (torch.nan, torch.inf):
        grads = torch.ones(2 * LEAST, 2)
        grads[17, 1] = value
        assert not telling_tokens(grads, torch.zeros(2 * LEAST, 3), 0.1)[0].isfinite().all()


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
    chosen, inputs = telling_tokens(grad.view(-1, 5), x.detach().view(-1, 6), 0.5)
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
