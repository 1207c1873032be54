"""N:M masks <-> coded bytes: which N of each M consecutive weights are kept, in less than a bit a weight.

The exact layout is in docs/format.md. There are C(M, N) ways to keep N of M, so a group is a digit in that base, and as
many digits as fit well make a whole number of bytes: for 2:4, whose base is 6, three groups a byte, 0.667 bit a weight
where 0.646 is the least.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

LARGEST_GROUP = 32
_HEAD = struct.Struct("<3B")  # dimension, N, M

Mask = NDArray[np.bool_]


def may_have_groups(kept: int, weights: int) -> bool:
    """Return whether a mask of which so many weights are kept may keep N of each M: some M makes N a whole number."""
    return any(kept * size % weights == 0 for size in range(2, LARGEST_GROUP + 1))


def encode_groups(mask: Mask) -> bytes | None:
    """Code a mask that keeps N of each M consecutive weights along some dimension; None if it is no such mask.

    Args:
        mask: bool, any shape; True where the weight is kept.

    Returns:
        The shortest of the byte strings that the mask has, one for each dimension and M that fit, with the smallest M
        and then the first dimension among equals.

    >>> encode_groups(np.array([[True, True, False, False] * 6])).hex()
    '0102040000'
    """
    coded = [_encode(mask, *pattern) for pattern in _patterns(mask)]
    return min(coded, key=len, default=None)


def decode_groups(data: bytes, shape: Sequence[int]) -> Mask:
    """Decode what `encode_groups` made of a mask of this shape.

    Raises:
        ValueError: no mask of this shape has this byte string; the bare reason.
    """
    if len(data) < _HEAD.size:
        raise ValueError("its groups are cut short")
    dimension, kept, size = _HEAD.unpack_from(data)
    if (
        dimension >= len(shape)
        or not 0 < kept < size <= LARGEST_GROUP
        or not math.prod(shape)
        or shape[dimension] % size
    ):
        raise ValueError(
            f"it claims to keep {kept} of each {size} weights along dimension {dimension}, which cannot be"
        )
    ways, count = math.comb(size, kept), math.prod(shape) // size
    together, width = _word(ways)
    words = -(-count // together)
    if len(data) != _HEAD.size + words * width:
        raise ValueError(f"its {count} groups need {words * width} bytes, it has {len(data) - _HEAD.size}")
    padded = np.zeros((words, 8), np.uint8)
    padded[:, :width] = np.frombuffer(data, np.uint8, offset=_HEAD.size).reshape(words, width)
    rest = padded.view("<u8").reshape(words)
    digits = np.empty((words, together), np.uint64)
    for place in range(together):
        rest, digits[:, place] = np.divmod(rest, np.uint64(ways))
    if rest.any() or digits.reshape(-1)[count:].any():
        raise ValueError("its groups are padded with something else than zeros")
    groups = _groups_of(digits.reshape(-1)[:count].astype(np.int64), kept, size)
    moved = [length for axis, length in enumerate(shape) if axis != dimension]
    mask: Mask = np.moveaxis(groups.reshape(*moved, shape[dimension]), -1, dimension)
    if encode_groups(mask) != data:
        raise ValueError("its groups are not the shortest way to store them")
    return mask


def _patterns(mask: Mask) -> Iterator[tuple[int, int, int]]:
    """Yield dimension, N and M of every pattern that the mask has, small groups first."""
    kept, total = int(np.count_nonzero(mask)), mask.size
    if kept in (0, total):
        return
    for size in range(2, LARGEST_GROUP + 1):
        if kept * size % total:
            continue
        for dimension, length in enumerate(mask.shape):
            if length % size == 0 and (_grouped(mask, dimension, size).sum(1) == kept * size // total).all():
                yield dimension, kept * size // total, size


def _grouped(mask: Mask, dimension: int, size: int) -> Mask:
    grouped: Mask = np.moveaxis(mask, dimension, -1).reshape(-1, size)
    return grouped


def _encode(mask: Mask, dimension: int, kept: int, size: int) -> bytes:
    # the kept positions of a group, p0 < p1 < ..., are the number C(p0, 1) + C(p1, 2) + ...
    positions = np.nonzero(_grouped(mask, dimension, size))[1].reshape(-1, kept)
    digits = sum(_binomials(size, i + 1)[positions[:, i]] for i in range(kept))
    together, width = _word(math.comb(size, kept))
    padded = np.zeros(-(-len(positions) // together) * together, np.uint64)
    padded[: len(positions)] = digits
    places = np.array([math.comb(size, kept) ** place for place in range(together)], np.uint64)
    words = (padded.reshape(-1, together) * places).sum(1, dtype=np.uint64).astype("<u8")
    return _HEAD.pack(dimension, kept, size) + words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _groups_of(digits: NDArray[np.int64], kept: int, size: int) -> Mask:
    groups = np.zeros((len(digits), size), bool)
    rows = np.arange(len(digits))
    for i in reversed(range(kept)):
        binomials = _binomials(size, i + 1)
        positions = np.searchsorted(binomials, digits, side="right") - 1
        groups[rows, positions] = True
        digits = digits - binomials[positions]
    return groups


def _binomials(size: int, count: int) -> NDArray[np.int64]:
    return np.array([math.comb(n, count) for n in range(size)], np.int64)


def _word(ways: int) -> tuple[int, int]:
    """Return how many digits in base `ways` are written together, and in how many bytes: at most 8, the densest."""
    fitting = []
    for width in range(1, 9):
        together = 0
        while ways ** (together + 1) <= 256**width:
            together += 1
        fitting.append((together, width))
    return max(fitting, key=lambda word: (word[0] / word[1], -word[1]))
