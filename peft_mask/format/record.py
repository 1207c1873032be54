"""Bits <-> record: one mask as the bytes in the file, with its shape, its fingerprint and a checksum.

The format is specified in docs/format.md. A mask has exactly one record, and the reader refuses every other one.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_mask.format.coding import decode_gaps
from peft_mask.format.fingerprint import Fingerprint
from peft_mask.format.packing import bits_shape, count_zeros, zero_positions
from peft_mask.format.payload import BITS, BLOCKS, GAPS, GROUPS, RANKS, STRUCTURED, read_payload, write_payload

MAGIC = b"PMSK"
CODECS = {1: (BITS, GAPS, RANKS), 2: (BLOCKS, GROUPS)}  # by version: a record has the first version that has its codec
VERSION = max(CODECS)
MAX_DIMENSIONS = 8
# of bits, or of bools for a structured mask, if no shape is expected: a few coded bytes may claim any number of weights
MAX_BYTES = 1 << 31


@dataclass(frozen=True)
class Header:
    """What a record says before the mask itself.

    Attributes:
        shape: shape of the mask.
        zeros: number of weights that are off.
        fingerprint: of the weight the mask was made for.
        codec: 0 = bits, 1 = gaps, 2 = ranks, 3 = blocks, 4 = groups; how the mask is stored, without meaning for it.
    """

    shape: tuple[int, ...]
    zeros: int
    fingerprint: Fingerprint
    codec: int


@dataclass(frozen=True)
class Record(Header):
    """One mask as read from the file.

    Attributes:
        bits: uint8 of shape `bits_shape(shape)`, on the CPU.
    """

    bits: Tensor


def frame_bytes(shape: Sequence[int]) -> int:
    """Bytes of a record beside its payload: header, shape, count, fingerprint and checksum.

    >>> frame_bytes((384, 384))
    60
    """
    return 52 + 4 * len(shape)


def longest_record(shape: Sequence[int]) -> int:
    """Bytes of the longest record a mask can have: that of packed bits.

    >>> longest_record((384, 384))
    18492
    """
    return frame_bytes(shape) + math.prod(bits_shape(shape))


def write_record(bits: Tensor, shape: Sequence[int], fingerprint: Fingerprint, base: Tensor | None = None) -> Tensor:
    """Write a mask as a record, in the shortest way that there is for it (see `payload`).

    Args:
        bits: uint8 of shape `bits_shape(shape)`, padding bits zero; any device.
        shape: shape of the mask, 1 to 8 dimensions, each below 2^32.
        fingerprint: of the weight the mask is for.
        base: that weight, with values, if readers will have it, too; None for a record that is read without it.

    Returns:
        uint8, one dimension, on the CPU; always the same bytes for the same arguments.

    Raises:
        ValueError: the mask has more than 8 dimensions.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a mask has at most {MAX_DIMENSIONS} dimensions, got {_words(shape)}")
    bits = bits.cpu()
    zeros = count_zeros(bits, shape)
    codec, payload = write_payload(bits, shape, zeros, base)
    version = next(version for version, codecs in CODECS.items() if codec in codecs)
    head = struct.pack("<4s4B", MAGIC, version, codec, len(shape), fingerprint.precision)
    body = head + struct.pack(f"<{len(shape)}IQ", *shape, zeros) + fingerprint.values + payload
    return torch.frombuffer(bytearray(body + struct.pack("<I", zlib.crc32(body))), dtype=torch.uint8)


def read_record(data: Tensor, shape: Sequence[int] | None = None, base: Tensor | None = None) -> Record:
    """Read a record: the inverse of `write_record`, refusing all that it would not write.

    Args:
        data: uint8, one dimension.
        shape: the shape the mask must have. It is checked before memory is taken, so that a forged record costs no more
            than this mask and its own length do. Without it, the packed bits of a mask may take 2 GiB.
        base: the weight the mask is for, with values; needed for ranks only.

    Raises:
        WrongBaseError: the record has ranks, and `base` is None or not the weight they were coded against.
        ValueError: the bare reason, to be completed with the names of module and file.

    >>> fingerprint = Fingerprint(bytes(32), precision=7)
    >>> read_record(write_record(torch.tensor([[5]], dtype=torch.uint8), (1, 3), fingerprint)).zeros
    1
    """
    header, payload = _split(data)
    sizes, zeros = header.shape, header.zeros
    if base is not None:
        shape = base.shape
    if shape is not None and sizes != tuple(shape):
        raise ValueError(f"its shape is {_words(sizes)}, expected {_words(shape)}")
    claimed = [max(size, 1) for size in sizes]
    taken = math.prod(claimed if header.codec in STRUCTURED else bits_shape(claimed))
    if shape is None and taken > MAX_BYTES:
        raise ValueError(f"its shape is {_words(sizes)}, which is too large to be believed")
    bits = read_payload(header.codec, payload, sizes, zeros, base)
    return Record(**vars(header), bits=bits)


def read_zero_positions(data: Tensor, base: Callable[[], Tensor]) -> Tensor:
    """Read where the mask of a record is off: what `zero_positions` finds in its bits, mostly without making them.

    Args:
        data: a record that `read_record` has accepted.
        base: returns the weight that the mask is for; called only if it is stored as ranks.

    Returns:
        int64, one dimension, on the CPU; row-major and ascending.

    Raises:
        ValueError: the record is damaged; the bare reason.
    """
    header, payload = _split(data)
    weights = math.prod(header.shape)
    if header.codec == GAPS and 2 * header.zeros <= weights:  # else the gaps are between kept weights
        return torch.from_numpy(decode_gaps(payload, header.zeros, weights))
    return zero_positions(read_bits(data, base), header.shape)


def read_bits(data: Tensor, base: Callable[[], Tensor]) -> Tensor:
    """Read the bits of a record that `read_record` has accepted; see `read_zero_positions`."""
    header = read_header(data)
    return read_record(data, header.shape, base() if header.codec == RANKS else None).bits


def read_header(data: Tensor) -> Header:
    """Read what a record says before the mask, without the base weight that the mask may be coded against.

    Raises:
        ValueError: it is not a whole record; the bare reason.
    """
    return _split(data)[0]


def _split(data: Tensor) -> tuple[Header, bytes]:
    """The header and the payload of a record whose checksum is right."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"a mask is stored as one dimension of uint8, got {data.dtype} of shape {tuple(data.shape)}")
    raw = data.cpu().numpy().tobytes()
    if raw[:4] != MAGIC:
        raise ValueError("it does not begin as a mask of peft_mask does")
    if len(raw) > 4 and raw[4] > VERSION:
        raise ValueError(f"it has format version {raw[4]}, written by a newer peft_mask, please upgrade peft_mask")
    if len(raw) < 8 or len(raw) < (start := 48 + 4 * raw[6]) + 4:
        raise ValueError(f"it is cut short, after {len(raw)} bytes")
    if zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        raise ValueError("its checksum is wrong: the file is damaged or cut short")
    version, codec, dimensions, precision = raw[4:8]
    if codec not in CODECS.get(version, ()) or not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"its header is malformed: version {version}, codec {codec}, {dimensions} dimensions")
    *sizes, zeros = struct.unpack_from(f"<{dimensions}IQ", raw, 8)
    if zeros > math.prod(sizes):
        raise ValueError(f"it claims {zeros} zeros among {_words(sizes)} weights")
    return Header(tuple(sizes), zeros, Fingerprint(raw[start - 32 : start], precision), codec), raw[start:-4]


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
