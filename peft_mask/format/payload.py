"""Bits <-> payload: the shortest of the ways that a record may store a mask, and a reader that refuses all others.

The format is specified in docs/format.md. Bits and gaps store any mask, ranks need the base weight, blocks and groups
need masks of one value a block or of N weights a group.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_mask.format.blocks import blocks_from_one, may_have_blocks, one_a_block, unit_of
from peft_mask.format.coding import coded_size, decode_gaps, encode_gaps
from peft_mask.format.groups import decode_groups, encode_groups, may_have_groups
from peft_mask.format.packing import (
    bits_from_positions,
    bits_shape,
    count_zeros,
    has_clean_padding,
    kept_positions,
    pack_bits,
    unpack_bits,
    zero_positions,
)
from peft_mask.format.ranks import WrongBaseError, decode_ranks, encode_ranks

BITS, GAPS, RANKS, BLOCKS, GROUPS = range(5)
STRUCTURED = (BLOCKS, GROUPS)


def write_payload(bits: Tensor, shape: Sequence[int], zeros: int, base: Tensor | None = None) -> tuple[int, bytes]:
    """Return the shortest way to store a mask, codec and bytes; of equally long ones the first codec.

    Args:
        bits: uint8 of shape `bits_shape(shape)`, on the CPU.
        shape: shape of the mask.
        zeros: number of weights that are off.
        base: the weight to code against, with values; None for what is read without it.
    """
    rarer = _rarer_positions(bits, shape, zeros)
    ways = [_plain(bits, shape, rarer)]
    if 0 < zeros < math.prod(shape):
        ways += _structured(bits, shape, zeros, rarer)
    if base is not None and zeros:
        ways.append((RANKS, encode_ranks(zero_positions(bits, shape).numpy(), base)))
    return min(ways, key=lambda way: (len(way[1]), way[0]))


def read_payload(codec: int, payload: bytes, shape: Sequence[int], zeros: int, base: Tensor | None = None) -> Tensor:
    """Read what `write_payload` wrote.

    Returns:
        uint8 of shape `bits_shape(shape)`, on the CPU.

    Raises:
        WrongBaseError: it is ranks, and `base` is None or not the weight they were coded against.
        ValueError: no mask of this shape with so many zeros is stored like this; the bare reason.
    """
    if codec == RANKS:
        return _read_ranks(payload, shape, zeros, base)
    if codec in STRUCTURED:
        return _read_structured(codec, payload, shape, zeros)
    return _read_plain(codec, payload, shape, zeros)


def _plain(bits: Tensor, shape: Sequence[int], rarer: NDArray[np.int64]) -> tuple[int, bytes]:
    payload = encode_gaps(rarer, math.prod(shape))
    return (GAPS, payload) if len(payload) < bits.numel() else (BITS, bits.numpy().tobytes())


def _structured(bits: Tensor, shape: Sequence[int], zeros: int, rarer: NDArray[np.int64]) -> list[tuple[int, bytes]]:
    # nearly no mask of single weights comes past these two, and unpacking it would be a third of the work
    blocks, groups = may_have_blocks(rarer, shape), may_have_groups(math.prod(shape) - zeros, math.prod(shape))
    if not blocks and not groups:
        return []
    mask, ways = unpack_bits(bits, shape).numpy(), []
    if blocks and (size := math.prod(unit := unit_of(mask))) > 1:
        small = torch.from_numpy(np.ascontiguousarray(one_a_block(mask, unit)))
        packed = pack_bits(small)
        codec, payload = _plain(packed, small.shape, _rarer_positions(packed, small.shape, zeros // size))
        ways.append((BLOCKS, struct.pack(f"<{len(unit)}IB", *unit, codec) + payload))
    if groups and (payload_of_groups := encode_groups(mask)) is not None:
        ways.append((GROUPS, payload_of_groups))
    return ways


def _read_structured(codec: int, payload: bytes, shape: Sequence[int], zeros: int) -> Tensor:
    mask = decode_groups(payload, shape) if codec == GROUPS else _read_blocks(payload, shape, zeros)
    bits = pack_bits(torch.from_numpy(mask))
    if count_zeros(bits, shape) != zeros:
        raise ValueError(f"it claims {zeros} zeros, its mask has {count_zeros(bits, shape)}")
    if write_payload(bits, shape, zeros) != (codec, payload):
        raise ValueError("it is not stored in the shortest way")
    return bits


def _read_blocks(payload: bytes, shape: Sequence[int], zeros: int) -> NDArray[np.bool_]:
    head = 4 * len(shape) + 1
    if len(payload) < head:
        raise ValueError("its blocks are cut short")
    *unit, codec = struct.unpack_from(f"<{len(shape)}IB", payload)
    size = math.prod(unit)
    if (
        any(step < 1 or length % step for step, length in zip(unit, shape, strict=True))
        or zeros % size
        or codec not in (BITS, GAPS)
    ):
        raise ValueError(f"its blocks of {'x'.join(map(str, unit))} weights cannot be")
    small = [length // step for step, length in zip(unit, shape, strict=True)]
    bits = _read_plain(codec, payload[head:], small, zeros // size)
    return blocks_from_one(unpack_bits(bits, small).numpy(), unit)


def _read_plain(codec: int, payload: bytes, shape: Sequence[int], zeros: int) -> Tensor:
    return (_read_gaps if codec == GAPS else _read_bits)(payload, shape, zeros)


def _read_bits(payload: bytes, shape: Sequence[int], zeros: int) -> Tensor:
    size = math.prod(bits_shape(shape))
    if len(payload) != size:
        raise ValueError(f"{_words(shape)} weights need {size} bytes of bits, it has {len(payload)}")
    bits = torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).view(bits_shape(shape))
    if not has_clean_padding(bits, shape):
        raise ValueError("its padding is not zero")
    if count_zeros(bits, shape) != zeros:
        raise ValueError(f"it claims {zeros} zeros, its bits have {count_zeros(bits, shape)}")
    if coded_size(_rarer_positions(bits, shape, zeros), math.prod(shape)) < size:
        raise ValueError("it is stored as bits, though gaps are shorter")
    return bits


def _read_gaps(payload: bytes, shape: Sequence[int], zeros: int) -> Tensor:
    if len(payload) >= math.prod(bits_shape(shape)):
        raise ValueError("it is stored as gaps, though bits are not longer")
    weights, kept = math.prod(shape), _codes_kept(shape, zeros)
    positions = decode_gaps(payload, weights - zeros if kept else zeros, weights)
    return bits_from_positions(torch.from_numpy(positions), shape, kept=kept)


def _read_ranks(payload: bytes, shape: Sequence[int], zeros: int, base: Tensor | None) -> Tensor:
    if base is None:
        raise WrongBaseError("it was coded against its base weight, which is not at hand")
    positions = decode_ranks(payload, zeros, base)
    bits = bits_from_positions(torch.from_numpy(positions), shape, kept=False)
    rarer = _rarer_positions(bits, shape, zeros) if _codes_kept(shape, zeros) else positions
    if len(payload) >= min(bits.numel(), coded_size(rarer, math.prod(shape))):
        raise ValueError("it is stored as ranks, though gaps or bits are not longer")
    return bits


def _rarer_positions(bits: Tensor, shape: Sequence[int], zeros: int) -> NDArray[np.int64]:
    find = kept_positions if _codes_kept(shape, zeros) else zero_positions
    return find(bits, shape).numpy()


def _codes_kept(shape: Sequence[int], zeros: int) -> bool:
    """Whether gaps are between kept weights, which are then rarer than the zeros."""
    return 2 * zeros > math.prod(shape)


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
