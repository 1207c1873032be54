"""What one score governs: a weight, a row, a column, the rows of an attention head, or a whole matrix.

A unit is a block of the weight, and the scores of a weight stand as its blocks do: with the shape of the weight divided
by that of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_mask.settings.options import Structure


def unit_shape(
    shape: Sequence[int], structure: Structure, dimension: int | None = None, head_size: int | None = None
) -> tuple[int, ...]:
    """Return the block of a weight that one score governs.

    - `"weight"`: a single weight. `"matrix"`: all of them.
    - `"row"`: what makes one output, `"column"`: what reads one input, however the weight is stored. A row of a
      convolution is a filter.
    - `"head"`: `head_size` rows, one after another.

    Args:
        shape: shape of the weight.
        structure: as in `MaskConfig`.
        dimension: which dimension is that of the inputs, 0 or 1, the other being that of the outputs; None if there is
            no such dimension.
        head_size: outputs of an attention head.

    Raises:
        ValueError: if the weight has no such units; the bare reason.

    >>> unit_shape((768, 384), "head", dimension=1, head_size=64)
    (64, 384)
    """
    if structure == "weight":
        return (1,) * len(shape)
    if structure == "matrix":
        return tuple(shape)
    if dimension is None:
        raise ValueError(f"which of its dimensions are inputs is not known, so it has no {structure}s")
    along, step = (dimension, 1) if structure == "column" else (1 - dimension, head_size if structure == "head" else 1)
    if step is None:
        raise ValueError("the size of its attention heads is not known: set head_size")
    if shape[along] % step:
        raise ValueError(f"its {shape[along]} outputs are not heads of {step}")
    return tuple(step if axis == along else length for axis, length in enumerate(shape))


def check_groups(shape: Sequence[int], dimension: int | None, size: int) -> None:
    """Check that the inputs of a weight are groups of `size`.

    Raises:
        ValueError: if they are not; the bare reason.
    """
    if dimension is None:
        raise ValueError("which of its dimensions are inputs is not known, so it has no groups of them")
    if shape[dimension] % size:
        raise ValueError(f"its {shape[dimension]} inputs are not groups of {size}")


def scores_shape(shape: Sequence[int], unit: Sequence[int]) -> torch.Size:
    """Return the shape of the scores of a weight: how many units there are in each dimension."""
    return torch.Size(length // step for length, step in zip(shape, unit, strict=True))
