"""Positions of zeros <-> bytes that only the holder of the base weight can read: ranks among its large weights.

A good mask switches off large weights: by default half a per cent of a matrix, all of them among its largest tenth. To
say which of that tenth takes a third fewer bytes than to say which of all; but then the tenth must be known. It is
found in the magnitudes rounded to bfloat16, which are the same whether a base is held in float32 or in bfloat16.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_mask.format.coding import decode_gaps, encode_gaps
from peft_mask.format.packing import bits_shape, count_zeros, kept_at, kept_ranks, pack_bits

Array = NDArray[np.int64]

_HEAD = struct.Struct("<HI")  # least magnitude, checksum of which weights have it
HEAD_BYTES = _HEAD.size
_INFINITY = 0x7F80  # in bfloat16; what is above would be NaN
_CHUNK = 1 << 19  # weights looked at together: these stay in a CPU's cache


class WrongBaseError(ValueError):
    """What is coded against a base weight cannot be read with the one at hand, or without any."""


def encode_ranks(positions: Array, weight: Tensor) -> bytes:
    """Code a set of positions as ranks among the weights that are at least as large as the smallest at one of them.

    Args:
        positions: int64, sorted, distinct, at least one; row-major in `weight`.
        weight: the base weight, any shape, strides, device and floating dtype, with values.

    Returns:
        A byte string that only these positions have, the same for the weight in float32 and in bfloat16.
    """
    least = _least(positions, weight)
    large = _large(weight, least)
    ranks = kept_ranks(large, weight.shape, positions)
    return _HEAD.pack(least, _checksum(large)) + encode_gaps(ranks, _count(large))


def decode_ranks(data: bytes, count: int, weight: Tensor) -> Array:
    """Decode what `encode_ranks` made of `count` positions.

    Memory grows with `len(data)` and with `weight`, whatever `count` claims.

    Raises:
        WrongBaseError: other weights are large in `weight` than were in the one that was coded against.
        ValueError: no set of `count` positions has this byte string.
    """
    if len(data) < _HEAD.size or not count:
        raise ValueError(f"{len(data)} coded bytes are no ranks of {count} positions")
    least, checksum = _HEAD.unpack_from(data)
    large = _large(weight, least)
    if _checksum(large) != checksum:
        raise WrongBaseError(
            "it was coded against its base weight, and the one at hand is not the same: that of another model, or "
            "rounded in another way, as float16 and quantized weights are. Load the base model it was trained on, in "
            "float32 or bfloat16; what is to be read on any other has to be saved with portable=True"
        )
    positions = kept_at(large, weight.shape, decode_gaps(data[_HEAD.size :], count, _count(large)))
    if _least(positions, weight) != least:
        raise ValueError("the coded positions are not in their canonical form")
    return positions


def _least(positions: Array, weight: Tensor) -> int:
    values = weight.detach().take(torch.from_numpy(positions).to(weight.device))
    return min(int(_magnitudes(values).min()), _INFINITY)


def _large(weight: Tensor, least: int) -> Tensor:
    """Which weights are of magnitude `least` or more, as the packed bits of a mask, on the CPU."""
    rows = weight.detach().reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    bits = torch.empty(bits_shape(weight.shape), dtype=torch.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for place, chunk in zip(bits.split(step), rows.split(step), strict=True):
        place.copy_(pack_bits(_at_least(chunk, least)))
    return bits


def _at_least(values: Tensor, least: int) -> Tensor:
    if values.device.type != "cpu":
        return _magnitudes(values) >= least
    # The same in numpy, whose operations on integers are twice as fast; of a copy, as FSDP2 could not resize a storage
    # that numpy has seen.
    return torch.from_numpy((values.to(torch.bfloat16, copy=True).view(torch.int16).numpy() & 0x7FFF) >= least)


def _magnitudes(values: Tensor) -> Tensor:
    """Magnitudes in bfloat16, as integers of the same order: its bits, int16, without the sign."""
    return values.to(torch.bfloat16).view(torch.int16) & 0x7FFF


def _checksum(bits: Tensor) -> int:
    return zlib.crc32(bits.numpy().data)


def _count(bits: Tensor) -> int:
    """Number of bits set."""
    return 8 * bits.numel() - count_zeros(bits, (8 * bits.numel(),))
