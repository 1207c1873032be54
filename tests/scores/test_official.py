"""Parity with the paper's official code (ptlmasking/maskbert): for the same scores, thresholds and inputs, our masks,
outputs and gradients are those of its formulas, which stand here anew; docs/paper.md names what is not copied."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, MaskStatistics
from peft_mask.scores.init import initial_scores
from peft_mask.tensors.noise import uniform_like

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


class OfficialBinarizer2(torch.autograd.Function):
    """MaskedLinear2: `(sign(score) + 1) / 2` of scores in [-1, 1], without gradient where the score is at a bound."""

    @staticmethod
    def forward(ctx, scores):
        ctx.save_for_backward(scores)
        return (scores.sign() + 1) / 2

    @staticmethod
    def backward(ctx, grad):
        (scores,) = ctx.saved_tensors
        return torch.where(scores.abs() >= 1, 0, grad)


class OfficialBinarizer3(torch.autograd.Function):
    """MaskedLinear3: `Bernoulli(sigmoid(score))`, and the gradient handed through; the draw is an argument here."""

    @staticmethod
    def forward(ctx, scores, uniform):
        return (uniform < scores.sigmoid()).float()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def official_controlled_init(weight, sparsity, kind):
    """controlled_init: scores of 0 or 2 tau, off for a fraction of the weights; of "uniform" drawn with replacement."""
    count = int(sparsity * weight.numel())
    if kind == "magnitude":
        off = weight.abs().reshape(-1).sort().indices[:count].numpy()
    else:
        off = np.random.default_rng(0).choice(weight.numel(), count, replace=True)
    scores = np.full(weight.numel(), 2 * TAU)
    scores[off] = 0
    return torch.from_numpy(scores).view(weight.shape)


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


def test_the_sign_is_masked_linear_2_between_its_bounds():
    linear, scores, x = case()
    scores = (scores * 20).clamp(-0.99, 0.99)
    assert_same(*both_ways(OfficialBinarizer2, linear, scores, x, torch.randn(5, 12), binarizer="sign"))


def test_mask_biases_is_the_codes():
    linear, scores, x = case()
    torch.manual_seed(1)
    bias_scores, upstream = torch.rand(12) * 0.04 - 0.01, torch.randn(5, 12)
    theirs = [value.clone().requires_grad_() for value in (scores, bias_scores)]
    bias_mask = OfficialBinarizer1.apply(theirs[1])
    assert 0 < bias_mask.sum() < 12
    y = official_linear(
        x, linear.weight.detach(), linear.bias.detach() * bias_mask, OfficialBinarizer1.apply(theirs[0])
    )
    y.backward(upstream)
    model, layer = ours(linear, scores, binarizer="threshold", mask_biases=True)
    with torch.no_grad():
        layer.bias_mask.peft_mask_scores["default"].copy_(bias_scores - TAU)
    y_ours = model(x)
    y_ours.backward(upstream)
    mine = [part.peft_mask_scores["default"].grad for part in (layer, layer.bias_mask)]
    assert_same((y, *(value.grad for value in theirs)), (y_ours, *mine))
    assert theirs[1].grad[bias_mask == 0].all(), "straight through, as with weights"
    official = official_sparsity([OfficialBinarizer1.apply(value) for value in theirs])
    assert MaskStatistics(model)(model)["sparsity"] == pytest.approx(official)


def test_a_sign_score_of_zero_is_kept_where_the_code_has_half_a_weight():
    linear, scores, _ = case()
    scores[:, 0] = 0
    assert (OfficialBinarizer2.apply(scores)[:, 0] == 0.5).all()
    _, layer = ours(linear, scores, binarizer="sign")
    assert layer.mask("default")[:, 0].all()


def test_a_score_at_a_bound_comes_back_and_goes_no_further_where_the_code_lets_nothing_pass():
    linear, scores, x = case()
    scores = scores.sign()
    upstream = torch.randn(5, 12)
    free, _ = both_ways(OfficialBinarizer1, linear, scores, x, upstream, binarizer="threshold")
    code, mine = both_ways(OfficialBinarizer2, linear, scores, x, upstream, binarizer="sign")
    assert not code[2].any()
    outward = free[2].sign() == -scores  # a step goes against the gradient
    torch.testing.assert_close(mine[2], free[2].masked_fill(outward, 0))
    assert 0 < outward.sum() < outward.numel()


def test_bernoulli_is_masked_linear_3_in_training_and_deterministic_in_evaluation():
    linear, scores, x = case()
    scores = scores * 50
    model, layer = ours(linear, scores, binarizer="bernoulli")
    ours_in_training, upstream = model(x), torch.randn(5, 12)
    ours_in_training.backward(upstream)
    rule = layer.rule("default")
    theirs = scores.clone().requires_grad_()
    mask = OfficialBinarizer3.apply(theirs, uniform_like(scores, rule.key))
    assert 0.1 < mask.mean() < 0.9
    expected = official_linear(x, linear.weight.detach(), linear.bias.detach(), mask)
    expected.backward(upstream)
    torch.testing.assert_close(ours_in_training, expected)
    torch.testing.assert_close(layer.peft_mask_scores["default"].grad, theirs.grad)
    model.eval()
    kept = official_linear(x, linear.weight, linear.bias, (scores >= 0).float())
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), kept)
    assert torch.equal(layer.mask("default"), scores >= 0)


# ---- structure ----


@pytest.mark.parametrize("structure", ["matrix", "head"])
def test_a_score_a_matrix_or_a_head_is_the_codes(structure):
    linear, _, x = case(outputs=12)
    heads = {"matrix": 1, "head": 3}[structure]
    scores = torch.tensor([[0.02], [0.0], [0.03]])[:heads]
    theirs = scores.clone().requires_grad_()
    # the code repeats a head's score over its rows, as many as the head has outputs
    mask = OfficialBinarizer1.apply(theirs).repeat_interleave(12 // heads, 0)
    x_theirs, upstream = x.clone().requires_grad_(), torch.randn(5, 12)
    y = official_linear(x_theirs, linear.weight.detach(), linear.bias.detach(), mask.expand(12, 20))
    y.backward(upstream)
    model, layer = ours(linear, scores, binarizer="threshold", structure=structure, head_size=4)
    x_ours = x.clone().requires_grad_()
    y_ours = model(x_ours)
    y_ours.backward(upstream)
    grads = x_ours.grad, layer.peft_mask_scores["default"].grad
    for one, other in zip((y, x_theirs.grad, theirs.grad), (y_ours, *grads), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("sparsity", [0.05, 0.5])
def test_the_controlled_starts_are_the_codes_but_without_replacement(sparsity):
    torch.manual_seed(0)
    weight = torch.randn(200, 300)

    def start(kind):
        config = MaskConfig.paper(init_weights=kind, init_sparsity=sparsity, seed=0)
        return initial_scores(weight, config, "layer").double() + TAU

    torch.testing.assert_close(start("magnitude"), official_controlled_init(weight, sparsity, "magnitude"))
    code, exact = official_controlled_init(weight, sparsity, "uniform"), start("exact_uniform")
    assert (code == 0).double().mean().item() == pytest.approx(1 - np.exp(-sparsity), abs=0.003), "quirk 6"
    assert (exact <= TAU).double().mean().item() == pytest.approx(sparsity, abs=1e-9)
    torch.testing.assert_close(exact.unique(), code.unique())
    double = start("double_uniform")
    off = double <= TAU
    assert off.double().mean().item() == pytest.approx(sparsity, abs=1e-9)
    for scores, low, high in ((double[off], 0.5, 0.9), (double[~off], 1.1, 1.5)):
        assert scores.min().item() == pytest.approx(low * TAU, rel=0.01)
        assert scores.max().item() == pytest.approx(high * TAU, rel=0.01)


def test_bernoulli_starts_every_score_at_the_codes_log_odds():
    config = MaskConfig(binarizer="bernoulli", candidates=None, init_sparsity=0.1)
    scores = initial_scores(torch.randn(3, 4), config, "layer")
    torch.testing.assert_close(scores, torch.full((3, 4), 1 - 0.1).logit())


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
