"""Masks of whole rows, columns, heads or matrices <-> a small mask with one weight for each of these units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def unit_of(mask: Mask) -> tuple[int, ...]:
    """Return the largest block, aligned to its own size, in each of which a mask has one value.

    Args:
        mask: bool, any shape without a zero.

    Returns:
        Its shape, which divides that of the mask: all ones for a mask without structure.

    >>> unit_of(np.array([[True, True], [False, False], [True, True]]))
    (1, 2)
    """
    return tuple(_step(np.moveaxis(mask, axis, 0)) for axis in range(mask.ndim))


def _step(slices: Mask) -> int:
    """The greatest common divisor of the number of slices and the places where one differs from the one before."""
    step = len(slices)
    for index in range(1, len(slices)):
        if index % step and not np.array_equal(slices[index], slices[index - 1]):
            step = math.gcd(step, index)
            if step == 1:
                break
    return step


def one_a_block(mask: Mask, unit: Sequence[int]) -> Mask:
    """Return the small mask: the first weight of each block of the shape `unit`."""
    small: Mask = mask[tuple(slice(None, None, step) for step in unit)]
    return small


def blocks_from_one(small: Mask, unit: Sequence[int]) -> Mask:
    """Return the mask of which `one_a_block` is `small`."""
    for axis, step in enumerate(unit):
        small = np.repeat(small, step, axis)
    return small
