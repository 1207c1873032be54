"""Bits <-> record: one mask as the bytes in the file, with its shape, its fingerprint and a checksum.

The format is specified in docs/format.md. A mask has exactly one record, and the reader refuses every other one.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coding import decode_gaps, encode_gaps
from .fingerprint import SAMPLES, Fingerprint
from .packing import (
    bits_from_positions,
    bits_shape,
    count_zeros,
    has_clean_padding,
    kept_positions,
    zero_positions,
)

MAGIC, VERSION = b"PMSK", 1
BITS, GAPS = 0, 1
MAX_DIMENSIONS = 8
# Few coded bytes may stand for many weights: without an expected shape, no more than 2 GiB of bits are allocated.
MAX_UNEXPECTED_WEIGHTS = 1 << 34


@dataclass(frozen=True)
class Record:
    """One mask as read from the file.

    Attributes:
        bits: uint8 of shape `bits_shape(shape)`, on the CPU.
        shape: shape of the mask.
        zeros: number of weights that are off.
        fingerprint: of the weight the mask was made for.
        codec: 0 = bits, 1 = gaps; how the mask was stored, without meaning for the mask.
    """

    bits: Tensor
    shape: tuple[int, ...]
    zeros: int
    fingerprint: Fingerprint
    codec: int


def write_record(bits: Tensor, shape: Sequence[int], fingerprint: Fingerprint) -> Tensor:
    """Write a mask as a record; the shorter of packed bits and coded gaps.

    Args:
        bits: uint8 of shape `bits_shape(shape)`, padding bits zero.
        shape: shape of the mask, 1 to 8 dimensions.
        fingerprint: of the weight the mask is made for.

    Returns:
        uint8, one dimension, on the CPU; the same bytes for the same mask, always.
    """
    bits = bits.cpu()
    zeros = count_zeros(bits, shape)
    codec, payload = _payload(bits, shape, zeros)
    head = struct.pack("<4s4B", MAGIC, VERSION, codec, len(shape), fingerprint.precision)
    head += struct.pack(f"<{len(shape)}IQ", *shape, zeros) + fingerprint.values
    body = head + payload
    return torch.frombuffer(bytearray(body + struct.pack("<I", zlib.crc32(body))), dtype=torch.uint8)


def read_record(data: Tensor, shape: Sequence[int] | None = None) -> Record:
    """Read a record: the inverse of `write_record`, refusing all that it would not write.

    Args:
        data: uint8, one dimension.
        shape: shape the mask must have. Everything is checked before anything of the size of the mask is allocated, so
            that a forged record costs no more memory than this shape. Without it a mask may have 2^34 weights.

    Raises:
        ValueError: the bare reason; the caller knows which module and file it is about.
    """
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"a mask is stored as one dimension of uint8, got {data.dtype} of shape {tuple(data.shape)}")
    raw = data.cpu().contiguous().numpy().tobytes()
    if raw[:4] != MAGIC:
        raise ValueError("it does not start as a mask of peft_mask does")
    if len(raw) >= 5 and raw[4] > VERSION:
        raise ValueError(
            f"it has format version {raw[4]}, written by a newer peft_mask, please upgrade (this one reads {VERSION})"
        )
    dimensions = raw[6] if len(raw) > 6 else 0
    start = 16 + 4 * dimensions + 2 * SAMPLES
    if len(raw) < start + 4:
        raise ValueError(f"it is cut short: {len(raw)} bytes")
    if zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        raise ValueError("its checksum is wrong: the file is damaged or cut short")
    version, codec, _, precision = raw[4:8]
    found: tuple[int, ...]
    *found, zeros = struct.unpack_from(f"<{dimensions}IQ", raw, 8)  # type: ignore[assignment]
    found = tuple(found)
    if version != VERSION or codec not in (BITS, GAPS) or not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"its header is malformed: version {version}, codec {codec}, {dimensions} dimensions")
    if shape is not None and found != tuple(shape):
        raise ValueError(f"its shape is {_words(found)}, expected {_words(shape)}")
    weights = math.prod(found)
    if shape is None and weights > MAX_UNEXPECTED_WEIGHTS:
        raise ValueError(f"it claims {weights} weights, more than 2^34")
    if zeros > weights:
        raise ValueError(f"it claims {zeros} zeros among {weights} weights")
    fingerprint = Fingerprint(raw[start - 2 * SAMPLES : start], precision)
    bits = _decode(codec, raw[start:-4], found, zeros)
    return Record(bits, found, zeros, fingerprint, codec)


def _payload(bits: Tensor, shape: Sequence[int], zeros: int) -> tuple[int, bytes]:
    rarer_is_kept = 2 * zeros > math.prod(shape)
    positions = (kept_positions if rarer_is_kept else zero_positions)(bits, shape)
    coded = encode_gaps(positions.numpy(), math.prod(shape))
    return (GAPS, coded) if len(coded) < bits.numel() else (BITS, bits.numpy().tobytes())


def _decode(codec: int, payload: bytes, shape: tuple[int, ...], zeros: int) -> Tensor:
    weights = math.prod(shape)
    size = math.prod(bits_shape(shape))
    if codec == GAPS:
        rarer_is_kept = 2 * zeros > weights
        if len(payload) >= size:
            raise ValueError("its codec is not the shorter one")
        positions = decode_gaps(payload, weights - zeros if rarer_is_kept else zeros, weights)
        return bits_from_positions(torch.from_numpy(positions), shape, kept=rarer_is_kept)
    if len(payload) != size:
        raise ValueError(f"{_words(shape)} weights need {size} bytes of bits, it has {len(payload)}")
    bits = torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).view(bits_shape(shape))
    if not has_clean_padding(bits, shape):
        raise ValueError("padding bits are set")
    if count_zeros(bits, shape) != zeros:
        raise ValueError(f"it claims {zeros} zeros, the bits have {count_zeros(bits, shape)}")
    if _payload(bits, shape, zeros)[0] != BITS:
        raise ValueError("its codec is not the shorter one")
    return bits


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
