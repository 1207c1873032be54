"""How masks differ: between tasks, between seeds, and over training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise

from peft_mask.format.masks import Masks

Group = Callable[[str], str]


def each(name: str) -> str:
    """Group masks by themselves: the name of the module."""
    return name


def block(name: str) -> str:
    """Group masks by block: the first number in the module's name, padded to sort; what has none keeps its name.

    >>> block("bert.encoder.layer.3.output.dense"), block("bert.pooler.dense")
    ('03', 'bert.pooler.dense')
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return f"{int(number[1]):02d}" if number else name


def whole(name: str) -> str:
    """Group all masks into one."""
    return "all"


def dissimilarity(
    first: Masks, second: Masks, first_start: Masks | None = None, second_start: Masks | None = None, by: Group = each
) -> dict[str, float]:
    """Measure how differently two trainings moved away from where they started.

        s = |M1 - M2| / (|M1 - S1| + |M2 - S2|)

    where |.| counts the weights that differ, and S are the masks at the start. 0: the same masks. 1, from the same
    start: no weight was flipped by both. From different starts it can exceed 1.

    Two masks that flip k1 and k2 weights of the same start at random, among c that may flip, are expected to have
    s = 1 - 2 k1 k2 / (c (k1 + k2)): compare with that, not with 1.

    Args:
        first: masks of one training.
        second: masks of another, of the same modules.
        first_start: the masks before the first training; None if it kept every weight, as the default of `MaskConfig`
            does. Of `MaskConfig.paper()` they are random: `masks_of(model)` before the first step, for the same seed.
        second_start: the same of the second training; None for `first_start`.
        by: what the masks are grouped by: `each`, `block`, `whole`, or a function from module name to name of a group.

    Returns:
        The dissimilarity of each group, in the order of `first`; NaN where neither training flipped a weight.

    Raises:
        ValueError: if the masks are of different modules, shapes or base weights.

    Source: Zhao et al. 2020, section 5 (similarity of masks).

    Example:
        >>> import torch
        >>> a = Masks({"0": torch.tensor([[False, True, True]])})
        >>> b = Masks({"0": torch.tensor([[False, False, True]])})
        >>> dissimilarity(a, b)
        {'0': 0.3333333333333333}
    """
    second_start = first_start if second_start is None else second_start
    apart = _differing(first, second, by)
    moved = _differing(first, first_start, by)
    for name, count in _differing(second, second_start, by).items():
        moved[name] += count
    return {name: apart[name] / moved[name] if moved[name] else math.nan for name in apart}


def flip_ratio(masks: Masks, start: Masks | None = None, by: Group = each) -> dict[str, float]:
    """Measure the fraction of weights whose mask differs from the start.

    Args:
        masks: masks after, or in, training.
        start: masks before it; None if it kept every weight.
        by: as in `dissimilarity`.

    Raises:
        ValueError: if the masks are of different modules, shapes or base weights.

    Source: official code of Zhao et al. 2020, `sparsity_recorder.py`. `MaskStatistics` has the same of a live model.
    """
    weights: dict[str, int] = {}
    for name, mask in masks.items():
        weights[by(name)] = weights.get(by(name), 0) + mask.numel()
    return {name: count / max(weights[name], 1) for name, count in _differing(masks, start, by).items()}


def iou(first: Masks, second: Masks, by: Group = each) -> dict[str, float]:
    """Measure the intersection over union of what two masks switch off.

    Of the zeros, because the sets of kept weights of two masks with few zeros are nearly the same whatever they do; for
    those, invert both.

    Args:
        first: masks.
        second: masks of the same modules.
        by: as in `dissimilarity`.

    Returns:
        For each group |off in both| / |off in one|; NaN where nothing is off in either.

    Raises:
        ValueError: if the masks are of different modules, shapes or base weights.

    Source: official code of Zhao et al. 2020, `sparsity_recorder.py`.
    """
    both, one = _off(first | second, by), _off(first & second, by)
    return {name: both[name] / one[name] if one[name] else math.nan for name in one}


def movement(snapshots: Iterable[tuple[int, Masks]]) -> list[dict[str, float]]:
    """Follow masks over a training.

    Args:
        snapshots: step and masks, in the order of steps; the first is the start. `Masks.load` reads them from Trainer's
            checkpoints, `masks_of(model)` takes them in a loop of one's own.

    Returns:
        A row a snapshot: `step`, `sparsity`, `flip_ratio` against the start, `flipped_since` the snapshot before,
        and `iou_start` and `iou_since`, the `iou` of the zeros with those of the start and of the snapshot before.

    Raises:
        ValueError: if there is no snapshot, or they are of different modules.
    """
    taken = list(snapshots)
    if not taken:
        raise ValueError("there is no snapshot to follow.")
    (first, start), rows = taken[0], []
    for (_, before), (step, masks) in pairwise([(first, start), *taken]):
        rows.append(
            {
                "step": step,
                "sparsity": masks.sparsity,
                "flip_ratio": flip_ratio(masks, start, whole)["all"],
                "flipped_since": flip_ratio(masks, before, whole)["all"],
                "iou_start": iou(masks, start, whole)["all"],
                "iou_since": iou(masks, before, whole)["all"],
            }
        )
    return rows


def _differing(first: Masks, second: Masks | None, by: Group) -> dict[str, int]:
    """Number of weights of each group in whose mask these differ; None keeps every weight."""
    return _off(first, by) if second is None else _off(~(first ^ second), by)


def _off(masks: Masks, by: Group) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, zeros in masks.zeros.items():
        counts[by(name)] = counts.get(by(name), 0) + zeros
    return counts
