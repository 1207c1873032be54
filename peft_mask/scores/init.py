"""Starting scores, relative to the threshold: a score below zero switches its weight off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peft_mask.scores.budget import budget_zeros
from peft_mask.scores.candidates import seeded
from peft_mask.scores.functional import per_unit
from peft_mask.scores.order import lowest
from peft_mask.scores.units import scores_shape
from peft_mask.settings.config import MaskConfig

# Half-width `a` of the paper's uniform distribution (official code: `--init_scale 2e-2`).
_UNIFORM_SCALE = 0.02
# The fraction of weights off at the start, where nothing else is said: the paper's.
_SPARSITY = 0.05
# A weight counts as at least this fraction of its matrix's root mean square: zeros start far away, not at infinity.
_SMALLEST = 0.01
# Where `"double_uniform"` starts, in units of the margin: the official code's .5 to .9 tau and 1.1 to 1.5 tau.
_NEAR, _FAR = 0.1, 0.5


def initial_scores(
    weight: torch.Tensor,
    config: MaskConfig,
    name: str,
    positions: torch.Tensor | None = None,
    unit: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the starting scores of one weight, or of its candidates.

    A block that one score governs counts as a weight of its root mean square.

    - `init_weights=True` with `binarizer="topk"`: zero. Every weight is kept, and the order of the scores is that of
      what the gradients say of them, whatever the learning rate.
    - `init_weights=True` with `"threshold"` and `"sign"`: `init_margin * rms(weight) / |weight|`: every weight is kept,
      and a large weight starts closer to the threshold than a small one. Adam moves every score at about the same
      speed, whatever its gradient, so with equal margins it would switch off small weights as readily as large ones,
      though they do little: the same accuracy would cost twice the bits (measured in docs/how-masks-learn.md).
    - `init_weights=True` with `"n:m"`: `init_margin * |weight| / rms(weight)`: the largest of a group are kept.
    - `init_weights=True` with `"bernoulli"`: `logit(1 - init_sparsity)`, every weight kept with one probability.
    - `"uniform"`: `U(-a, s) - tau` with `a = 0.02` and `s = (a + tau) / p - a`, so that a fraction `p = init_sparsity`
      starts off. A smaller `p` also widens the range, which makes kept weights harder to switch off.
    - `"exact_uniform"`, `"magnitude"`, `"magnitude_and_uniform"`: `init_margin`, negative for a fraction
      `init_sparsity`, rounded to whole weights: at random, the smallest in magnitude, or the latter in the backbone and
      the former in a head, whose weights are themselves random.
    - `"double_uniform"`: at random as well, `init_margin` times `U(-0.5, -0.1)` or `U(0.1, 0.5)`.
    - `False`: `restart_margin` with a random sign, negative for as many as the budget says, or with probability
      `init_sparsity`; with `"n:m"` uniform.

    With `"sign"` all of them are clamped to [-1, 1].

    Args:
        weight: the weight to be masked, any shape and floating dtype. On the meta device it has no values: margins are
            `init_margin` everywhere then, and of equal magnitudes the first are the smallest.
        config: the adapter's configuration.
        name: path of the module; with `config.seed` it fixes the random numbers, independent of all other modules.
        positions: the candidates, or None if every weight has a score.
        unit: the block of the weight that one score governs, by default a single weight.

    Returns:
        float32 tensor of the weight's shape divided by `unit`, or one score a candidate, on the CPU or the device of
        `weight`.

    Source: `"uniform"`: Zhao et al. 2020, section 4 ("initial sparsity"), and official code, `maskers.py`, lines
    229-232; the other names: its `--controlled_init`, lines 159-227, which draws with replacement and so misses the
    fraction it is asked for. The defaults are ours.
    """
    blocks = weight.shape if unit is None else scores_shape(weight.shape, unit)
    shape = blocks if positions is None else positions.shape
    generator, margin = seeded(config, name), config.init_margin
    if config.init_weights is True:
        if config.binarizer == "topk":
            return torch.zeros(shape)
        if config.binarizer == "bernoulli":
            return torch.full(shape, restart_margin(config))
        relative = _relative_magnitude(weight, positions, blocks)
        if config.binarizer == "n:m":
            return margin * relative
        return _within(config, margin / relative.clamp_min(_SMALLEST))
    uniform = torch.rand(shape, generator=generator, device="cpu")
    if config.init_weights is False:
        if config.binarizer == "n:m":
            return margin * uniform
        if config.target_sparsity is not None:
            off = lowest(uniform, budget_zeros(blocks.numel(), config.target_sparsity))
        else:
            p = config.init_sparsity
            off = uniform < (0.5 if p is None or config.binarizer == "bernoulli" else p)
        return torch.where(off, -restart_margin(config), restart_margin(config))
    sparsity = _SPARSITY if config.init_sparsity is None else config.init_sparsity
    if config.init_weights == "uniform":
        width = (_UNIFORM_SCALE + config.threshold) / sparsity
        return _within(config, uniform * width - (_UNIFORM_SCALE + config.threshold))
    by_magnitude = config.init_weights == "magnitude" or (
        config.init_weights == "magnitude_and_uniform" and not config.is_in_head(name)
    )
    order = _relative_magnitude(weight, positions, blocks) if by_magnitude else uniform
    off = lowest(order, round(sparsity * uniform.numel()))
    if config.init_weights == "double_uniform":
        again = torch.rand(shape, generator=generator, device="cpu")
        return torch.where(off, -margin, margin) * (_NEAR + (_FAR - _NEAR) * again)
    return torch.where(off, -margin, margin)


def restart_margin(config: MaskConfig) -> float:
    """Return how far from the threshold scores restart that are made of a mask."""
    if config.binarizer == "bernoulli":  # with the probabilities that a fresh adapter starts with
        sparsity = _SPARSITY if config.init_sparsity is None else config.init_sparsity
        return math.log((1 - sparsity) / sparsity)
    return config.init_margin


def _within(config: MaskConfig, scores: torch.Tensor) -> torch.Tensor:
    return scores.clamp(-1, 1) if config.binarizer == "sign" else scores


def _relative_magnitude(weight: torch.Tensor, positions: torch.Tensor | None, blocks: torch.Size) -> torch.Tensor:
    """Magnitudes, or root mean squares of blocks, relative to that of the matrix; 1 where a weight has none."""
    if weight.is_meta:
        return torch.ones(blocks if positions is None else positions.shape)
    weight = weight.detach()
    rms = weight.float().square().mean().sqrt()
    magnitude = (weight if positions is None else weight.take(positions.long())).float().abs()
    if blocks != weight.shape:
        magnitude = per_unit(magnitude.square(), blocks).mul(blocks.numel() / weight.numel()).sqrt()
    # there is no such unit of a weight of zeros, or one that is itself not finite
    return torch.where(rms.isfinite() & (rms > 0), magnitude / rms, 1.0)
