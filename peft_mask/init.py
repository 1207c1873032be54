"""Starting scores, relative to the threshold: a score below zero switches its weight off."""

from __future__ import annotations

import zlib

import torch

from peft_mask.config import MaskConfig

# Half-width `a` of the paper's uniform distribution (official code: `--init_scale 2e-2`).
_UNIFORM_SCALE = 0.02


def initial_scores(shape: torch.Size, config: MaskConfig, name: str) -> torch.Tensor:
    """Return the starting scores of one weight.

    - `init_weights=True`: `init_margin` everywhere: every weight is kept.
    - `"uniform"`: `U(-a, s) - tau` with `a = 0.02` and `s = (a + tau) / p - a`, so that a fraction `p = init_sparsity`
      starts off. A smaller `p` also widens the range, which makes kept weights harder to switch off.
    - `False`: `init_margin` with a random sign, negative with probability `init_sparsity`.

    Args:
        shape: shape of the weight.
        config: the adapter's configuration.
        name: path of the module; with `config.seed` it fixes the random numbers, independent of all other modules.

    Returns:
        float32 tensor of `shape` on the CPU.

    Source: Zhao et al. 2020, section 4 ("initial sparsity"); official code, `maskers.py`, lines 229-232.
    """
    if config.init_weights is True:
        return torch.full(shape, config.init_margin)
    generator = None
    if config.seed is not None:
        # torch's CPU generator looks at the lowest 32 bits of its seed only, so seed and name are hashed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{name}".encode()))
    uniform = torch.rand(shape, generator=generator, device="cpu")
    if config.init_weights is False:
        off = uniform < (0.5 if config.init_sparsity is None else config.init_sparsity)
        return torch.where(off, -config.init_margin, config.init_margin)
    sparsity = 0.05 if config.init_sparsity is None else config.init_sparsity
    width = (_UNIFORM_SCALE + config.threshold) / sparsity
    return uniform * width - (_UNIFORM_SCALE + config.threshold)
