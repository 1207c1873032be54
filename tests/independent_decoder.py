"""A second reader of mask records, written from docs/format.md alone: pure Python, a bit at a time, no peft_mask."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence


def decode(record: bytes, base: Sequence[float] = ()) -> tuple[tuple[int, ...], list[bool], int, tuple[float, ...]]:
    """Return shape, mask in row-major order, precision and values of the fingerprint. Ranks need the base weight."""
    magic, version, codec, dimensions, precision = struct.unpack_from("<4s4B", record)
    assert (magic, version) == (b"PMSK", 1 if codec < 3 else 2)
    assert zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], "little")
    *shape, zeros = struct.unpack_from(f"<{dimensions}IQ", record, 8)
    fingerprint = struct.unpack_from("<16e", record, 16 + 4 * dimensions)
    mask = decode_payload(codec, record[48 + 4 * dimensions : -4], shape, zeros, base)
    assert mask.count(False) == zeros
    return tuple(shape), mask, precision, fingerprint


def decode_payload(codec: int, payload: bytes, shape: list[int], zeros: int, base: Sequence[float]) -> list[bool]:
    size = math.prod(shape)
    if codec == 0:
        return from_bits(payload, shape)
    if codec == 3:
        *unit, inner = struct.unpack_from(f"<{len(shape)}IB", payload)
        small = [length // step for length, step in zip(shape, unit, strict=True)]
        ones = decode_payload(inner, payload[4 * len(shape) + 1 :], small, zeros // math.prod(unit), base)
        return [ones[row_major(map(int.__floordiv__, place, unit), small)] for place in places_of(shape)]
    if codec == 4:
        return from_groups(payload, shape)
    kept_listed = codec == 1 and 2 * zeros > size
    places = [p for p in range(size) if codec == 1 or magnitude(base[p]) >= int.from_bytes(payload[:2], "little")]
    count = size - zeros if kept_listed else zeros
    listed = {places[i] for i in from_gaps(payload if codec == 1 else payload[6:], count, len(places))}
    return [(position in listed) == kept_listed for position in range(size)]


def places_of(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def row_major(place: Iterable[int], shape: Sequence[int]) -> int:
    position = 0
    for index, length in zip(place, shape, strict=True):
        position = position * length + index
    return position


def from_groups(payload: bytes, shape: list[int]) -> list[bool]:
    dimension, kept, group = payload[:3]
    ways, mask = math.comb(group, kept), [False] * math.prod(shape)
    words = [(max(n for n in range(65) if ways**n <= 256**width), width) for width in range(1, 9)]
    together, width = max(words, key=lambda word: (word[0] / word[1], -word[1]))
    others = [length for axis, length in enumerate(shape) if axis != dimension]
    for index, place in enumerate(places_of([*others, shape[dimension] // group])):
        start = 3 + index // together * width
        number = int.from_bytes(payload[start : start + width], "little") // ways ** (index % together) % ways
        for i in range(kept, 0, -1):
            at = max(n for n in range(group) if math.comb(n, i) <= number)
            number -= math.comb(at, i)
            mask[row_major([*place[:dimension], place[-1] * group + at, *place[dimension:-1]], shape)] = True
    return mask


def from_bits(payload: bytes, shape: list[int]) -> list[bool]:
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    width = (columns + 7) // 8
    return [bool(payload[r * width + c // 8] >> c % 8 & 1) for r in range(rows) for c in range(columns)]


def magnitude(weight: float) -> int:
    bits = int.from_bytes(struct.pack("<f", abs(weight)), "little")
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def from_gaps(payload: bytes, count: int, size: int) -> Iterator[int]:
    bits = iter([byte >> i & 1 for byte in payload for i in range(8)])
    blocks = math.ceil(count / 64)
    unary = []
    for _ in range(blocks + count):
        unary.append(0)
        while not next(bits):
            unary[-1] += 1
    width, widths = next(k for k in range(64) if 25 * 2**k * count >= 12 * size - 6 * count or not count), []
    for code in unary[:blocks]:
        width += -(code + 1) // 2 if code % 2 else code // 2
        widths += [width] * 64
    remainders = [0] * count
    for plane in range(max(widths, default=0)):
        for i in range(count):
            if widths[i] > plane:
                remainders[i] |= next(bits) << plane
    position = -1
    for i in range(count):
        position += 1 + (unary[blocks + i] << widths[i]) + remainders[i]
        yield position
