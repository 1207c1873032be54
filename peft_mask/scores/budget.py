"""Bytes <-> sparsity: how large the file of a mask will be, and which sparsity fills a given size.

A mask of n weights with a fraction p of zeros takes n H(p) / 8 bytes and the frame of its record; n f H(p / f) / 8 if
it is coded against a base in whose largest fraction f the zeros lie. What the coder makes of it is within a few per
cent of that (docs/format.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_mask.format.packing import entropy_bits
from peft_mask.format.ranks import HEAD_BYTES
from peft_mask.format.record import frame_bytes


def budget_zeros(weights: int, sparsity: float) -> int:
    """Return how many weights of a matrix are off at a sparsity; at least one, or a small matrix would have no mask."""
    return max(1, round(sparsity * weights))


def file_bytes(records: Mapping[str, int]) -> int:
    """Return the size of `adapter_model.safetensors`, whose masks of the modules named have records of these sizes.

    >>> file_bytes({"layer": 80})
    216
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in records.items():
        header[f"base_model.model.{name}.peft_mask_bits"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [start, start + size],
        }
        start += size
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + 8 * math.ceil(text / 8) + start  # safetensors pads its header to a multiple of 8


def expected_bytes(shapes: Mapping[str, Sequence[int]], sparsity: float, among: float = 1.0) -> int:
    """Return the size of the file to expect of masks of these shapes, each with this sparsity.

    Args:
        shapes: shape of each mask, by module name.
        sparsity: fraction of weights off, at most `among`.
        among: the fraction of the weights, known to the reader, that the zeros lie in.
    """
    sizes = {}
    for name, shape in shapes.items():
        weights = math.prod(shape)
        zeros = budget_zeros(weights, sparsity)
        payload = math.ceil(entropy_bits(zeros, max(zeros, round(among * weights))) / 8)
        sizes[name] = frame_bytes(shape) + payload + (HEAD_BYTES if among < 1.0 else 0)
    return file_bytes(sizes)


def sparsity_for_bytes(size: Callable[[float], int], target: int, most: float) -> float:
    """Return the sparsity at which a file has the size `target`.

    Args:
        size: size of the file in bytes at a sparsity, increasing up to `most`.
        target: size aimed at.
        most: largest sparsity allowed.

    Returns:
        The sparsity, to within a thousandth of itself.

    Raises:
        ValueError: if `target` is out of reach; the message says what is in reach.
    """
    least = 1e-6
    if not size(least) <= target <= size(most):
        raise ValueError(
            f"target_bytes={target} is out of reach: the masks of this model take from {size(least)} bytes (one weight "
            f"of each matrix off) to {size(most)} bytes (a fraction {most:g} of each)."
        )
    low, high = least, most
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if size(middle) <= target else (low, middle)
    return low
