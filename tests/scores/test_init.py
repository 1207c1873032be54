"""Starting scores: their distribution, and that they come from the seed alone."""

from functools import partial

import pytest
import torch

from peft_mask import MaskConfig
from peft_mask.scores.init import initial_scores

uniform = partial(MaskConfig, binarizer="threshold", candidates=None, init_weights="uniform")
SHAPE = torch.Size((500, 400))
WEIGHT = torch.zeros(SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_keeps_every_weight_large_ones_closer_to_the_threshold(dtype):
    weight = torch.tensor([[3.0, -4.0, 0.0, 0.001]], dtype=dtype)
    rms = 2.5
    scores = initial_scores(weight, MaskConfig(binarizer="threshold", candidates=None, init_margin=0.25), "layer")
    expected = torch.tensor([[0.25 * rms / 3, 0.25 * rms / 4, 25.0, 25.0]])
    torch.testing.assert_close(scores, expected)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 3), torch.full((2, 3), float("inf")), torch.empty(2, 3, device="meta")]
)
def test_a_weight_without_a_magnitude_starts_at_the_margin(weight):
    assert (
        initial_scores(weight, MaskConfig(binarizer="threshold", candidates=None, init_margin=0.25), "layer") == 0.25
    ).all()


@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("sparsity", [0.01, 0.05, 0.5, 0.95])
def test_uniform_scores_have_the_papers_range_and_the_asked_sparsity(threshold, sparsity):
    config = uniform(init_sparsity=sparsity, threshold=threshold, seed=0)
    scores = initial_scores(WEIGHT, config, "layer") + threshold  # back to the paper's scores
    assert (scores < threshold).float().mean().item() == pytest.approx(sparsity, abs=0.005)
    assert scores.min() >= -0.02
    assert scores.max().item() == pytest.approx((0.02 + threshold) / sparsity - 0.02, rel=1e-3)


def test_uniform_defaults_to_the_papers_five_per_cent():
    scores = initial_scores(WEIGHT, uniform(seed=0), "layer")
    assert (scores < 0).float().mean().item() == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("sparsity", [None, 0.1])
def test_false_is_a_random_mask_of_two_constants(sparsity):
    config = MaskConfig(
        binarizer="threshold", candidates=None, init_weights=False, init_sparsity=sparsity, init_margin=0.125
    )
    scores = initial_scores(WEIGHT, config, "layer")
    assert set(scores.unique().tolist()) == {-0.125, 0.125}
    assert (scores < 0).float().mean().item() == pytest.approx(sparsity or 0.5, abs=0.01)


def test_a_seed_fixes_every_module_on_its_own():
    config = uniform(seed=5)
    first = initial_scores(WEIGHT, config, "a")
    torch.rand(7)  # the global generator has no say
    assert torch.equal(first, initial_scores(WEIGHT, config, "a"))
    assert not torch.equal(first, initial_scores(WEIGHT, config, "b"))
    assert not torch.equal(first, initial_scores(WEIGHT, uniform(seed=6), "a"))


def test_seeded_scores_are_the_same_on_every_machine():
    scores = initial_scores(torch.zeros(1, 4), uniform(seed=0), "golden")
    torch.testing.assert_close(scores, torch.tensor(GOLDEN), rtol=0, atol=0)


def test_without_a_seed_the_global_generator_decides():
    config = uniform()
    first = initial_scores(WEIGHT, config, "a")
    assert not torch.equal(first, initial_scores(WEIGHT, config, "a"))
    torch.manual_seed(0)
    assert torch.equal(first, initial_scores(WEIGHT, config, "a"))


GOLDEN = [[0.26688283681869507, 0.2926490902900696, 0.34059134125709534, 0.1460028737783432]]
