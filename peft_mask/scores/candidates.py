"""Candidates: the weights that have a score, and so may be switched off; all others are kept.

A mask at fine-tuning quality switches off half a per cent of the weights, nearly all of them large. With scores for the
tenth that may go, scores, gradients and optimizer state take a tenth of the memory. A layer's candidates are the
positions of weights in row-major order, ascending, int32 wherever these reach.
"""

from __future__ import annotations

import zlib

import torch

from peft_mask.format.packing import index_dtype
from peft_mask.scores.order import lowest
from peft_mask.scores.principal import off_principal
from peft_mask.settings.config import MaskConfig


def candidate_count(numel: int, config: MaskConfig) -> int | None:
    """Number of candidates among `numel` weights, at least one; None if every weight has a score."""
    if config.candidates is None:
        return None
    return max(1, round(config.candidates * numel))


def choose_candidates(
    weight: torch.Tensor, config: MaskConfig, name: str, include: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Choose the candidates of one weight by `config.candidate_rule`.

    Args:
        weight: the weight to be masked, any shape and floating dtype. Without values, on the meta device, its first
            positions are returned, to be replaced when the adapter is loaded.
        config: the adapter's configuration.
        name: path of the module; with `config.seed` it fixes a random choice, independent of all other modules.
        include: positions that must be among them, int64.

    Returns:
        Positions on the device of `weight` (the CPU for meta), or None if every weight has a score.

    Raises:
        ValueError: if more positions must be included than there are candidates; the bare reason.
    """
    count = candidate_count(weight.numel(), config)
    if count is None:
        return None
    if weight.is_meta:
        return torch.arange(count, dtype=index_dtype(weight.numel()))
    if config.candidate_rule == "random":
        preference = torch.rand(weight.numel(), generator=seeded(config, f"candidates/{name}")).to(weight.device)
    elif config.candidate_rule == "off-principal":
        preference = off_principal(weight, count)
    else:
        preference = weight.detach().reshape(-1).abs().nan_to_num_(0.0)
    return by_preference(preference, count, include)


def by_preference(preference: torch.Tensor, count: int, include: torch.Tensor | None = None) -> torch.Tensor:
    """Return the positions of the `count` largest values of `preference`, those in `include` before all others."""
    if include is not None:
        if len(include) > count:
            raise ValueError(f"it switches off {len(include)} weights, but only {count} are candidates")
        preference = preference.clone().index_fill_(0, include.to(preference.device), torch.inf)
    return lowest(preference.neg(), count).nonzero().squeeze(1).to(index_dtype(preference.numel()))


def candidates_without(current: torch.Tensor, protected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return as many candidates, none of them protected: those there are, and in the places that are free the largest.

    Args:
        current: positions of the candidates, int64.
        protected: positions of weights that are to be kept, int64.
        weight: the weight, any shape.

    Raises:
        ValueError: if there are not enough other weights; the bare reason.
    """
    kept = current[~torch.isin(current, protected)]
    if len(current) > weight.numel() - len(protected.unique()):
        raise ValueError(
            f"{len(current)} of its {weight.numel()} weights are candidates, so that {len(protected.unique())} cannot "
            "be left out: set a smaller fraction of candidates"
        )
    preference = weight.detach().reshape(-1).abs().nan_to_num_(0.0).float().index_fill_(0, protected, -1.0)
    return by_preference(preference, len(current), kept)


def checked_positions(positions: torch.Tensor, count: int, numel: int, name: str) -> torch.Tensor:
    """Return positions given as candidates, int64, ascending.

    Args:
        positions: integers, any shape.
        count: how many there have to be.
        numel: number of weights.
        name: of the module, for the message.

    Raises:
        ValueError: if they cannot be its candidates; the message names the module.
    """
    new = positions.detach().reshape(-1).long().unique()
    if positions.is_floating_point() or len(new) != count or not ((new >= 0) & (new < numel)).all():
        raise ValueError(
            f"cannot set the candidates of '{name}': expected {count} distinct integers from 0 to {numel - 1}, got "
            f"{len(new)} distinct values of dtype {positions.dtype} from shape {tuple(positions.shape)}."
        )
    return new


def moved_scores(scores: torch.Tensor, current: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the scores of new candidates: those they have at their `current` positions, zero where they have none."""
    where = torch.searchsorted(current, new).clamp(max=len(current) - 1)
    return torch.where(current[where] == new, scores[where], 0)


def seeded(config: MaskConfig, name: str) -> torch.Generator | None:
    """Return a CPU generator for what is random in one module; None, the global one, if the adapter has no seed."""
    if config.seed is None:
        return None
    # torch's CPU generator looks at the lowest 32 bits of its seed only, so seed and name are hashed into these.
    return torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{name}".encode()))
