"""Masks of whole rows, columns, heads or matrices <-> a small mask with one weight for each of these units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def may_have_blocks(positions: NDArray[np.int64], shape: Sequence[int]) -> bool:
    """Return whether a mask may have blocks of more than one weight, by a look at few of its weights.

    Args:
        positions: of the weights of one value, row-major and ascending, at least one.
        shape: shape of the mask.

    Returns:
        False only if `unit_of` would be all ones: the first of these weights is the first of its block, and no neighbor
        of it, in any dimension, has its value.
    """
    neighbors = positions[0] + [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found = positions[np.searchsorted(positions, neighbors).clip(max=len(positions) - 1)]
    return bool((found == neighbors).any())


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
