"""Several masks -> one, by votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

CombinationType = Literal["intersection", "union", "majority"]


def check_votes(adapters: Sequence[object], weights: Sequence[float], combination_type: str) -> None:
    """Refuse votes that have no meaning.

    Raises:
        ValueError: there is no adapter, not one weight for each, a weight that is not positive and finite, or no such
            combination type.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected a weight for each of at least one adapter, got {len(weights)} for {len(adapters)}.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights are votes and must be positive, got {list(weights)}. Leave an adapter out instead.")
    if combination_type not in get_args(CombinationType):
        raise ValueError(
            f"combination_type must be one of {list(get_args(CombinationType))}, got {combination_type!r}."
        )


def combined_mask(masks: Sequence[Tensor], weights: Sequence[float], combination_type: CombinationType) -> Tensor:
    """Combine masks of one weight.

    Args:
        masks: bool tensors of one shape, True where the weight is kept.
        weights: positive, how much the vote of each mask counts. Only a majority depends on them.
        combination_type: `"intersection"`: kept if all masks keep it, as when the adapters are active together.
            `"union"`: kept if one mask does. `"majority"`: kept if masks with at least half of all weights do.

    Returns:
        bool tensor of that shape.

    >>> masks = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    >>> combined_mask(masks, [2.0, 1.0], "majority")
    tensor([ True,  True, False])
    """
    if combination_type == "intersection":
        return torch.stack(list(masks)).all(0)
    if combination_type == "union":
        return torch.stack(list(masks)).any(0)
    votes = sum(weight * mask.double() for weight, mask in zip(weights, masks, strict=True))
    assert isinstance(votes, Tensor)
    return votes >= sum(weights) / 2
