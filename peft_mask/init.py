"""Starting scores, relative to the threshold: a score below zero switches its weight off."""

from __future__ import annotations

import zlib

import torch

from peft_mask.config import MaskConfig

# Half-width `a` of the paper's uniform distribution (official code: `--init_scale 2e-2`).
_UNIFORM_SCALE = 0.02
# A weight counts as at least this fraction of its matrix's root mean square: zeros start far away, not at infinity.
_SMALLEST = 0.01


def initial_scores(weight: torch.Tensor, config: MaskConfig, name: str) -> torch.Tensor:
    """Return the starting scores of one weight.

    - `init_weights=True`: `init_margin * rms(weight) / |weight|`: every weight is kept, and a large weight starts
      closer to the threshold than a small one. Adam moves every score at about the same speed, whatever its gradient,
      so with equal margins it would switch off small weights as readily as large ones, though they do little: the same
      accuracy would cost twice the bits (measured in docs/training.md).
    - `"uniform"`: `U(-a, s) - tau` with `a = 0.02` and `s = (a + tau) / p - a`, so that a fraction `p = init_sparsity`
      starts off. A smaller `p` also widens the range, which makes kept weights harder to switch off.
    - `False`: `init_margin` with a random sign, negative with probability `init_sparsity`.

    Args:
        weight: the weight to be masked, any shape and floating dtype. On the meta device it has no values, and `True`
            gives `init_margin` everywhere.
        config: the adapter's configuration.
        name: path of the module; with `config.seed` it fixes the random numbers, independent of all other modules.

    Returns:
        float32 tensor of the weight's shape.

    Source: `"uniform"`: Zhao et al. 2020, section 4 ("initial sparsity"), and official code, `maskers.py`, lines
    229-232. The default is ours.
    """
    if config.init_weights is True:
        return _margins(weight.detach(), config.init_margin)
    generator = None
    if config.seed is not None:
        # torch's CPU generator looks at the lowest 32 bits of its seed only, so seed and name are hashed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{name}".encode()))
    uniform = torch.rand(weight.shape, generator=generator, device="cpu")
    if config.init_weights is False:
        off = uniform < (0.5 if config.init_sparsity is None else config.init_sparsity)
        return torch.where(off, -config.init_margin, config.init_margin)
    sparsity = 0.05 if config.init_sparsity is None else config.init_sparsity
    width = (_UNIFORM_SCALE + config.threshold) / sparsity
    return uniform * width - (_UNIFORM_SCALE + config.threshold)


def _margins(weight: torch.Tensor, margin: float) -> torch.Tensor:
    if weight.is_meta:
        return torch.full(weight.shape, margin)
    magnitude = weight.float().abs()
    rms = magnitude.square().mean().sqrt()
    scores = margin * rms / magnitude.clamp_min(_SMALLEST * rms)
    return scores.nan_to_num(nan=margin)  # a weight of zeros, or one that is itself not finite
