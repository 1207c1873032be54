"""Sorted positions <-> coded bytes: the gaps between positions, in Rice codes whose width follows the local density.

The exact layout is in docs/format.md. A set of positions has one byte string, and decoding refuses every other. No
general compressor is used: their output differs between versions, and this one decodes by array operations alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]

BLOCK = 64  # gaps that share a width: fewer follow the density better, more cost less to announce


def encode_gaps(positions: Array, size: int) -> bytes:
    """Code a set of positions.

    A gap g = position - previous position - 1 becomes a quotient g >> k in unary and a remainder of k bits. Each block
    of 64 gaps has its own k, the best one for geometric gaps with the mean of the block.

    Args:
        positions: int64, sorted, distinct, below `size`.
        size: number of places, at most 2^48.

    Returns:
        A byte string that only these positions have; empty for no positions.

    >>> encode_gaps(np.array([2, 3, 9]), 16).hex()
    '9a04'
    """
    gaps, unary, widths = _plan(positions, size)
    ends = np.cumsum(unary + 1)
    bits = np.zeros(_bit_length(unary, widths), np.uint8)
    bits[ends - 1] = 1
    start = int(ends[-1]) if len(ends) else 0
    for bit in range(_widest(widths)):
        plane = gaps[widths > bit] >> bit & 1
        bits[start : start + len(plane)] = plane
        start += len(plane)
    return np.packbits(bits, bitorder="little").tobytes()


def coded_size(positions: Array, size: int) -> int:
    """Number of bytes `encode_gaps` would return."""
    _, unary, widths = _plan(positions, size)
    return (_bit_length(unary, widths) + 7) // 8


def decode_gaps(data: bytes, count: int, size: int) -> Array:
    """Decode what `encode_gaps` made of `count` positions below `size`.

    Memory grows with `len(data)`, whatever `count` and `size` claim.

    Raises:
        ValueError: no set of `count` positions below `size` has this byte string.
    """
    blocks = -(-count // BLOCK)
    if blocks + count > 8 * len(data):
        raise ValueError(f"{len(data)} coded bytes are too few for {count} positions")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    ends = np.flatnonzero(bits.view(np.bool_))[: blocks + count] + 1  # of bools numpy finds them several times as fast
    if len(ends) < blocks + count:
        raise ValueError("the coded positions end early")
    unary = np.diff(ends, prepend=0) - 1
    block_widths = _width(size, count) + np.cumsum(_unzigzag(unary[:blocks]))
    if count and not 0 <= block_widths.min() <= block_widths.max() <= size.bit_length():
        raise ValueError("the coded positions have an impossible width")
    widths = np.repeat(block_widths, BLOCK)[:count]
    if len(data) != (_bit_length(unary, widths) + 7) // 8:
        raise ValueError("the coded positions end early or late")
    quotients = unary[blocks:]
    if (quotients > size >> widths).any():
        raise ValueError("a coded position is out of range")
    gaps = quotients << widths
    start = int(ends[-1]) if len(ends) else 0
    for bit in range(_widest(widths)):
        wide = widths > bit
        stop = start + int(np.count_nonzero(wide))
        gaps[wide] |= bits[start:stop].astype(np.int64) << bit
        start = stop
    if gaps.sum(dtype=np.float64) > size:  # in float64, where a forged sum cannot wrap around
        raise ValueError("a coded position is out of range")
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= size:
        raise ValueError("a coded position is out of range")
    # Width and remainder leave one choice of bits for each gap; so widths and padding are all that is left to check.
    if bits[start:].any() or not np.array_equal(block_widths, _block_widths(positions)):
        raise ValueError("the coded positions are not in their canonical form")
    return positions


def _plan(positions: Array, size: int) -> tuple[Array, Array, Array]:
    """The gaps, all that is written in unary (width steps, then quotients), and the width for each gap."""
    gaps = np.diff(positions, prepend=-1) - 1
    block_widths = _block_widths(positions)
    widths = np.repeat(block_widths, BLOCK)[: len(gaps)]
    steps = np.diff(block_widths, prepend=_width(size, len(positions)))
    return gaps, np.concatenate([_zigzag(steps), gaps >> widths]), widths


def _block_widths(positions: Array) -> Array:
    count = len(positions)
    stops = np.minimum(np.arange(BLOCK, count + BLOCK, BLOCK), count)
    spans = np.diff(positions[stops - 1], prepend=-1)
    counts = np.diff(stops, prepend=0)
    widths = np.zeros(len(stops), np.int64)
    while (short := 25 * counts << widths < 12 * spans - 6 * counts).any():
        widths += short
    return widths


def _width(span: int, count: int) -> int:
    """Smallest k with 25 * 2^k * count >= 12 * span - 6 * count.

    For geometric gaps of mean m, width k is better than k + 1 as soon as exp(-2^k / (m + 1/2)) <= (sqrt(5) - 1) / 2,
    that is from 2^k = 0.48 (m + 1/2) on; here m + 1 = span / count.
    Source: A. Kiely, Selecting the Golomb parameter in Rice coding, IPN Progress Report 42-159, 2004.
    """
    width = 0
    while 25 * count << width < 12 * span - 6 * count and count:
        width += 1
    return width


def _zigzag(steps: Array) -> Array:
    return np.where(steps < 0, -2 * steps - 1, 2 * steps)


def _unzigzag(codes: Array) -> Array:
    return np.where(codes & 1, -(codes + 1 >> 1), codes >> 1)


def _bit_length(unary: Array, widths: Array) -> int:
    return int(unary.sum()) + len(unary) + int(widths.sum())


def _widest(widths: Array) -> int:
    return int(widths.max()) if len(widths) else 0
