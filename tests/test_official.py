"""Parity with the paper's official code (ptlmasking/maskbert): for the same scores, thresholds and inputs, our masks,
outputs and gradients are those of its formulas, which stand here anew; docs/paper.md names what is not copied."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, MaskStatistics
from peft_mask.init import initial_scores

TAU, SCALE = 0.01, 0.02  # --threshold and --init_scale


# ---- the official formulas ----


class OfficialBinarizer1(torch.autograd.Function):
    """MaskedLinear1: `mask[score <= tau] = 0; mask[score > tau] = 1`, and the gradient handed through."""

    @staticmethod
    def forward(ctx, scores):
        mask = scores.clone()
        mask[scores.le(TAU)] = 0.0
        mask[scores.gt(TAU)] = 1.0
        return mask

    @staticmethod
    def backward(ctx, grad):
        return grad


def official_linear(x, weight, bias, mask):
    return F.linear(x, weight * mask, bias)


def official_uniform_range(sparsity):
    """`U(-a, s)` with `s = (a + tau) / p - a`, so that a fraction p starts at tau or below."""
    return -SCALE, (SCALE + TAU) / sparsity - SCALE


def official_sparsity(masks):
    """get_sparsity_over_whole_model: zeros over elements of the masked modules alone."""
    return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


# ---- ours on the same numbers ----


def ours(linear, official_scores, **fields):
    """A masked copy of `linear` whose scores are the official ones, which we store relative to the threshold."""
    config = MaskConfig(target_modules=["0"], candidates=None, **fields)
    model = get_peft_model(nn.Sequential(linear), config).train()
    layer = model.base_model.model[0]
    shift = TAU if fields["binarizer"] == "threshold" else 0.0
    with torch.no_grad():
        layer.peft_mask_scores["default"].copy_(official_scores - shift)
    return model, layer


def case(seed=0, outputs=12, inputs=20):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs), torch.rand(outputs, inputs) * 0.1 - 0.03, torch.randn(5, inputs)


def both_ways(official, linear, scores, x, upstream, **fields):
    """Output, gradient of the input and gradient of the scores: the official ones, then ours."""
    theirs, x_theirs = scores.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs = official_linear(x_theirs, linear.weight.detach(), linear.bias.detach(), official.apply(theirs))
    y_theirs.backward(upstream)
    model, layer = ours(linear, scores, **fields)
    x_ours = x.clone().requires_grad_()
    y_ours = model(x_ours)
    y_ours.backward(upstream)
    return (y_theirs, x_theirs.grad, theirs.grad), (y_ours, x_ours.grad, layer.peft_mask_scores["default"].grad)


def assert_same(theirs, ours):
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


# ---- binarizers ----


def test_the_threshold_is_masked_linear_1_in_mask_output_and_gradients():
    linear, scores, x = case()
    theirs, mine = both_ways(OfficialBinarizer1, linear, scores, x, torch.randn(5, 12), binarizer="threshold")
    assert_same(theirs, mine)
    off = OfficialBinarizer1.apply(scores) == 0
    assert 0.1 < off.float().mean() < 0.9
    assert (mine[2][off] != 0).all(), "straight through: also where the weight is off"
    _, layer = ours(linear, scores, binarizer="threshold")
    assert torch.equal(layer.mask("default"), ~off)


def test_a_score_at_the_threshold_is_kept_as_in_the_paper_and_off_in_its_code():
    linear, scores, _ = case()
    scores[0] = TAU
    _, layer = ours(linear, scores, binarizer="threshold")
    official = OfficialBinarizer1.apply(scores).bool()
    assert not official[0].any()
    assert layer.mask("default")[0].all()
    assert torch.equal(layer.mask("default")[1:], official[1:])


def test_a_weight_that_is_off_is_positive_zero_where_the_code_has_negative_zero():
    linear, scores, _ = case()
    _, layer = ours(linear, scores, binarizer="threshold")
    off, weight = ~layer.mask("default"), linear.weight.detach()
    official = weight * OfficialBinarizer1.apply(scores)
    masked = layer.masked_weight(["default"]).detach()
    assert torch.equal(official, masked), "equal as numbers"
    assert official[off].signbit().any()
    assert not masked[off].signbit().any()


# ---- starting scores ----


@pytest.mark.parametrize("sparsity", [0.01, 0.03, 0.05, 0.1, 0.5, 0.95])
def test_the_papers_preset_draws_from_the_official_range(sparsity):
    config = MaskConfig.paper(init_sparsity=sparsity, seed=0)
    scores = initial_scores(torch.zeros(400, 500), config, "layer") + TAU
    low, high = official_uniform_range(sparsity)
    assert scores.min().item() == pytest.approx(low, abs=1e-3 * (high - low))
    assert scores.max().item() == pytest.approx(high, abs=1e-3 * (high - low))
    quantiles = np.quantile(scores.numpy(), np.linspace(0, 1, 11))
    np.testing.assert_allclose(quantiles, np.linspace(low, high, 11), atol=0.01 * (high - low))
    assert (scores <= TAU).float().mean().item() == pytest.approx(sparsity, abs=0.003)


# ---- figures ----


def test_sparsity_over_the_whole_model_counts_masked_modules_only():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), MaskConfig.paper(target_modules=["0"], seed=0)
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.peft_mask_scores["default"].uniform_(-0.02, 0.05)
    official = OfficialBinarizer1.apply(layer.peft_mask_scores["default"].detach() + TAU)
    assert MaskStatistics(model)(model)["sparsity"] == pytest.approx(official_sparsity([official]))
