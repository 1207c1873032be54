"""Starting scores, relative to the threshold: a score below zero switches its weight off."""

from __future__ import annotations

import torch

from peft_mask.binarize import lowest
from peft_mask.budget import budget_zeros
from peft_mask.candidates import seeded
from peft_mask.config import MaskConfig

# Half-width `a` of the paper's uniform distribution (official code: `--init_scale 2e-2`).
_UNIFORM_SCALE = 0.02
# A weight counts as at least this fraction of its matrix's root mean square: zeros start far away, not at infinity.
_SMALLEST = 0.01


def initial_scores(
    weight: torch.Tensor, config: MaskConfig, name: str, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the starting scores of one weight, or of its candidates.

    - `init_weights=True` with `binarizer="topk"`: zero. Every weight is kept, and the order of the scores is that of
      what the gradients say of them, whatever the learning rate.
    - `init_weights=True` with `binarizer="threshold"`: `init_margin * rms(weight) / |weight|`: every weight is kept,
      and a large weight starts closer to the threshold than a small one. Adam moves every score at about the same
      speed, whatever its gradient, so with equal margins it would switch off small weights as readily as large ones,
      though they do little: the same accuracy would cost twice the bits (measured in docs/training.md).
    - `"uniform"`: `U(-a, s) - tau` with `a = 0.02` and `s = (a + tau) / p - a`, so that a fraction `p = init_sparsity`
      starts off. A smaller `p` also widens the range, which makes kept weights harder to switch off.
    - `False`: `init_margin` with a random sign, negative for as many as the budget says, or with probability
      `init_sparsity`.

    Args:
        weight: the weight to be masked, any shape and floating dtype. On the meta device it has no values, and margins
            are `init_margin` everywhere.
        config: the adapter's configuration.
        name: path of the module; with `config.seed` it fixes the random numbers, independent of all other modules.
        positions: the candidates, or None if every weight has a score.

    Returns:
        float32 tensor of the weight's shape, or one score a candidate, on the CPU or the device of `weight`.

    Source: `"uniform"`: Zhao et al. 2020, section 4 ("initial sparsity"), and official code, `maskers.py`, lines
    229-232. The defaults are ours.
    """
    shape = weight.shape if positions is None else positions.shape
    if config.init_weights is True:
        if config.binarizer == "topk":
            return torch.zeros(shape)
        return _margins(weight.detach(), config.init_margin, positions)
    uniform = torch.rand(shape, generator=seeded(config, name), device="cpu")
    if config.init_weights is False:
        if config.target_sparsity is not None:
            off = lowest(uniform, budget_zeros(weight.numel(), config.target_sparsity))
        else:
            off = uniform < (0.5 if config.init_sparsity is None else config.init_sparsity)
        return torch.where(off, -config.init_margin, config.init_margin)
    sparsity = 0.05 if config.init_sparsity is None else config.init_sparsity
    width = (_UNIFORM_SCALE + config.threshold) / sparsity
    return uniform * width - (_UNIFORM_SCALE + config.threshold)


def _margins(weight: torch.Tensor, margin: float, positions: torch.Tensor | None) -> torch.Tensor:
    if weight.is_meta:
        return torch.full(weight.shape if positions is None else positions.shape, margin)
    rms = weight.float().square().mean().sqrt()
    magnitude = (weight if positions is None else weight.take(positions.long())).float().abs()
    scores = margin * rms / magnitude.clamp_min(_SMALLEST * rms)
    return scores.nan_to_num(nan=margin)  # a weight of zeros, or one that is itself not finite
