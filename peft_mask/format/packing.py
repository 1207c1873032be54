"""Mask <-> packed bits: eight weights a byte, and the positions of the zeros.

A mask of any shape is seen as a matrix of `rows = shape[0]` by `cols = prod(shape[1:])` weights (one row if it has
one dimension). Each row takes `ceil(cols / 8)` bytes, its first weight in the lowest bit, as
`np.packbits(bitorder="little")` does; bit 1 = kept, and the padding bits behind the last weight are zero.
Pure functions, computing on the device of their argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def index_dtype(numel: int) -> torch.dtype:
    """Return the smaller of int32 and int64 that holds every position among `numel` weights, and their number.

    >>> index_dtype(1000)
    torch.int32
    """
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def bits_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the packed bits of a mask: `(rows, ceil(cols / 8))`.

    >>> bits_shape((2, 17))
    (2, 3)
    """
    rows, cols = _matrix(shape)
    return rows, (cols + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bits.

    Args:
        mask: bool, at least one dimension, any strides.

    Returns:
        uint8 of shape `bits_shape(mask.shape)`; padding bits are zero, so equal masks have equal bits.

    >>> pack_bits(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.uint8)
    """
    matrix = mask.reshape(_matrix(mask.shape))
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.packbits(matrix.numpy(), axis=1, bitorder="little"))
    return _pack_on_device(matrix)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack bits into the mask: `unpack_bits(pack_bits(mask), mask.shape)` is `mask`.

    Args:
        bits: uint8 of shape `bits_shape(shape)`.
        shape: shape of the mask.

    Returns:
        bool of `shape`, contiguous, on the device of `bits`.
    """
    cols = _matrix(shape)[1]
    # Looking up eight bools as one word is ten times faster than masking and comparing bit by bit.
    words = _mask_of_byte(bits.device).index_select(0, bits.reshape(-1).int())
    return words.view(bits.shape).view(torch.bool)[:, :cols].contiguous().view(tuple(shape))


def zero_positions(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Sorted row-major positions of the weights that are off.

    Args:
        bits: uint8 of shape `bits_shape(shape)`.
        shape: shape of the mask.

    Returns:
        int64, one dimension, on the device of `bits`.

    >>> zero_positions(torch.tensor([[5]], dtype=torch.uint8), (1, 3))
    tensor([1])
    """
    return kept_positions(bits ^ _all_kept(shape, bits.device), shape)


def kept_positions(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Sorted row-major positions of the weights that are kept: the twin of `zero_positions`."""
    if bits.device.type != "cpu":
        return unpack_bits(bits, shape).view(-1).nonzero().squeeze(1)
    # On the CPU numpy is several times faster than torch, and looking at whole bytes first faster still if few are set.
    flat = bits.numpy().reshape(-1)
    index = np.flatnonzero(flat != 0)
    if 4 * len(index) > len(flat):
        return torch.from_numpy(np.flatnonzero(unpack_bits(bits, shape).view(-1).numpy()))
    cols, row_bytes = _matrix(shape)[1], bits.shape[1]
    first = 8 * index - index // row_bytes * (8 * row_bytes - cols)
    return torch.from_numpy(np.sort(_set_bits(first, flat[index])))


def kept_ranks(bits: Tensor, shape: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of kept weights before each of the given positions: where they stand in `kept_positions`.

    Args:
        bits: uint8 of shape `bits_shape(shape)`, on the CPU.
        shape: shape of the mask.
        positions: int64, row-major, ascending.

    >>> kept_ranks(torch.tensor([[5]], dtype=torch.uint8), (1, 3), np.array([2]))
    array([1])
    """
    flat = bits.numpy().reshape(-1)
    places = positions + positions // _matrix(shape)[1] * _padding(shape)
    byte = places >> 3
    ranks = _COUNTS[flat[byte] & ((1 << (places & 7)) - 1).astype(np.uint8)].astype(np.int64)
    for start, counts, before in _counted(flat):
        here = slice(*np.searchsorted(byte, (start, start + len(counts))))
        ranks[here] += before[byte[here] - start]
    return ranks


def kept_at(bits: Tensor, shape: Sequence[int], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the kept weights of the given ranks, `kept_positions(bits, shape)[ranks]`, without finding the rest.

    Args:
        bits: uint8 of shape `bits_shape(shape)`, on the CPU.
        shape: shape of the mask.
        ranks: int64, ascending, below the number of kept weights.

    >>> kept_at(torch.tensor([[5]], dtype=torch.uint8), (1, 3), np.array([1]))
    array([2])
    """
    flat = bits.numpy().reshape(-1)
    positions = np.empty_like(ranks)
    for start, counts, before in _counted(flat):
        here = slice(*np.searchsorted(ranks, (before[0], before[-1] + counts[-1])))
        within = np.searchsorted(before, ranks[here], side="right") - 1
        byte = start + within
        places = 8 * byte + _PLACES[flat[byte], ranks[here] - before[within]]
        positions[here] = places - byte // bits.shape[1] * _padding(shape)
    return positions


def _counted(flat: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield bytes in chunks: the first one's index, how many bits are set in each, and in all before each.

    Counts of the bits before each byte, all at once, would take eight times the memory of the bits.
    """
    total = 0
    for start in range(0, len(flat), _CHUNK):
        counts = _COUNTS[flat[start : start + _CHUNK]]
        ends = total + np.cumsum(counts, dtype=np.int64)
        yield start, counts, ends - counts
        total = int(ends[-1])


def bits_from_positions(positions: Tensor, shape: Sequence[int], *, kept: bool) -> Tensor:
    """Bits of the mask that keeps exactly the given weights (`kept=True`) or all but them (`kept=False`).

    Args:
        positions: int64, one dimension, distinct row-major positions below `prod(shape)`.
        shape: shape of the mask.
        kept: which of the two symbols the positions are of.

    Returns:
        uint8 of shape `bits_shape(shape)`.
    """
    cols, padding = _matrix(shape)[1], _padding(shape)
    bits = _all_kept(shape, positions.device)
    if kept:
        bits = torch.zeros_like(bits)
    position = positions + (positions // cols * padding if padding and cols else 0)
    value = _bit_values(positions.device)[position & 7]
    # Distinct bits of a byte add up without a carry, so a sum is an "or", and a difference switches off.
    bits.view(-1).index_add_(0, position >> 3, value, alpha=1 if kept else -1)
    return bits


def count_zeros(bits: Tensor, shape: Sequence[int]) -> int:
    """Number of weights that are off.

    >>> count_zeros(torch.tensor([[5]], dtype=torch.uint8), (1, 3))
    1
    """
    if bits.device.type == "cpu":
        kept = torch.bincount(bits.reshape(-1), minlength=256) * torch.from_numpy(_COUNTS)
    else:  # where `bincount` would wait for the device twice, and this does once, below
        of_byte = _mask_of_byte(bits.device).view(-1, 1).view(torch.bool).sum(1)
        kept = of_byte.index_select(0, bits.reshape(-1).int())
    return math.prod(shape) - int(kept.sum())


def entropy_bits(zeros: int, weights: int) -> float:
    """Bits that a mask takes of which only the number of zeros is known: `n H(p)` with `p = zeros / n`.

    `H(p) = -p log2 p - (1 - p) log2 (1 - p)`.

    >>> entropy_bits(1, 2)
    2.0
    """
    return sum(count * math.log2(weights / count) for count in (zeros, weights - zeros) if count)


def has_clean_padding(bits: Tensor, shape: Sequence[int]) -> bool:
    """Whether every padding bit is zero, as it must be."""
    cols = _matrix(shape)[1]
    return cols % 8 == 0 or not bool((bits[:, -1] >> (cols % 8)).any())


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if not len(shape):
        raise ValueError("a mask needs at least one dimension, got a scalar")
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def _bit_values(device: torch.device) -> Tensor:
    """1, 2, 4, ..., 128, made on the device: to copy a list there, the host waits until the device is idle."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


# Eight bools, read as one word, are its bits 0, 8, ..., 56. Multiplying by this word puts the first at bit 56, the
# second at 57, and so on, and no two products meet at one bit, so that nothing is carried into the highest byte.
_GATHER = 0x0102040810204080


def _pack_on_device(matrix: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8))
    words = padded.reshape(-1).view(torch.int64)
    return (words * _GATHER >> 56).to(torch.uint8).view(bits_shape(matrix.shape))


def _mask_of_byte(device: torch.device) -> Tensor:
    """For every value of a byte its eight bools, as one int64."""
    values = torch.arange(256, dtype=torch.uint8, device=device)
    return ((values.unsqueeze(1) & _bit_values(device)) != 0).view(torch.int64).squeeze(1)


def _padding(shape: Sequence[int]) -> int:
    """Bits behind the last weight of each row."""
    return -_matrix(shape)[1] % 8


_COUNTS = np.array([value.bit_count() for value in range(256)], np.uint8)  # of the bits set in a byte
_PLACES = np.array(
    [sorted(range(8), key=lambda bit: not value >> bit & 1) for value in range(256)], np.uint8
)  # of them
_CHUNK = 1 << 20  # bytes of bits counted together
_LOWEST_BIT = np.array([0] + [(value & -value).bit_length() - 1 for value in range(1, 256)])


def _set_bits(first: NDArray[np.int64], values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """`first + i` for each bit i set in a byte: the lowest of every byte first, then the next, while there are any."""
    found = [first[:0]]
    while len(values):
        found.append(first + _LOWEST_BIT[values])
        values = values & (values - 1)
        left = np.flatnonzero(values != 0)
        first, values = first[left], values[left]
    return np.concatenate(found)


def _all_kept(shape: Sequence[int], device: torch.device) -> Tensor:
    cols = _matrix(shape)[1]
    bits = torch.full(bits_shape(shape), 255, dtype=torch.uint8, device=device)
    if cols % 8:
        bits[:, -1] = (1 << cols % 8) - 1
    return bits
