"""Mutates good records and files, and demands of each: refused in words, or the one record of the mask it holds."""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from attacks.forge import as_tensor, join, seal, split
from peft_mask import Masks
from peft_mask.format import record
from peft_mask.format.coding import BLOCK
from peft_mask.format.fingerprint import fingerprint_of
from peft_mask.format.mask_file import read_masks
from peft_mask.format.packing import pack_bits, unpack_bits

SHAPES = ((40, 50), (30, 33), (7, 23), (1, 1), (0, 4), (200,), (4, 3, 5, 5), (64, 64), (3, 1000))
SPARSITIES = (0.0, 0.004, 0.03, 0.3, 0.5, 0.97, 1.0)
UNKNOWN_MOST = 1 << 20  # what a mask of unknown shape may take here, in place of 2 GiB, so that memory says something


@dataclass(frozen=True)
class Good:
    """A good record, and the base weight it was made for."""

    data: bytes
    shape: tuple[int, ...]
    base: Tensor


@dataclass
class Findings:
    """What became of the mutants.

    Attributes:
        reasons: why they were refused, without figures and names, and how often.
        accepted: how many were the one record of a mask, most of them untouched by chance or with other figures.
        worst: the most bytes that numpy and Python took at a time, for one mutant beyond itself.
        failures: numbers of those that were neither refused nor good, with what happened.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    worst: int = 0
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        """Number of refused mutants."""
        return sum(self.reasons.values())


def corpus() -> list[Good]:
    """Good records of every codec and of shapes with and without padding, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        base = torch.randn(shape, generator=generator)
        large = base.abs() >= base.abs().flatten().quantile(0.9) if base.numel() else base.bool()
        for sparsity in SPARSITIES:
            anywhere = torch.rand(shape, generator=generator) >= sparsity
            for mask, against in ((anywhere, None), (anywhere | ~large, base)):
                data = record.write_record(pack_bits(mask), shape, fingerprint_of(base), against)
                found.append(Good(data.numpy().tobytes(), shape, base))
    return found


def fuzz(files: int, seed: int, start: int = 0) -> Findings:
    """Try that many mutants; number n of a seed is the same whatever else is tried."""
    findings, good = Findings(), corpus()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(record, "MAX_BYTES", UNKNOWN_MOST):
        path = Path(folder) / "adapter_model.safetensors"
        tracemalloc.start()
        for number in range(start, start + files):
            random = Random(f"{seed}:{number}")
            try:
                refused = (
                    _try_file(random, good, path) if random.random() < 0.1 else _try_record(random, good, findings)
                )
            except Exception as error:
                findings.failures[number] = f"{type(error).__name__}: {error}"
                continue
            if refused is None:
                findings.accepted += 1
            else:
                findings.reasons[_without_figures(refused)] += 1
        tracemalloc.stop()
    return findings


def report(files: int, seed: int, start: int = 0) -> bool:
    """Fuzz, print the figures; whether nothing failed."""
    began = time.perf_counter()
    findings = fuzz(files, seed, start)
    for reason, count in findings.reasons.most_common():
        print(f"{count:8} x {reason}")
    for number, failure in findings.failures.items():
        print(f"FAILED: python -m attacks fuzz --seed {seed} --start {number} --files 1: {failure}")
    seconds = time.perf_counter() - began
    print(f"{files} mutants of seed {seed} in {seconds:.0f} s:")
    print(f"{findings.refused} refused, for {len(findings.reasons)} reasons,")
    print(f"{findings.accepted} the one record of a mask, {len(findings.failures)} failures;")
    print(f"most memory taken for one by Python and numpy: {findings.worst:,} bytes")
    return not findings.failures


# ---- one mutant ----


def _try_record(random: Random, good: list[Good], findings: Findings) -> str | None:
    """Read a mutant: the reason why it was refused, or None if it is a record that would be written again."""
    one = random.choice(good)
    data = mutant(random, one, good)
    # as a model reads it, which knows its weight; as one without values does; as nobody who knows anything
    shape, base = random.choice([(one.shape, one.base), (one.shape, one.base), (one.shape, None), (None, None)])
    given = as_tensor(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        read = record.read_record(given, shape, base)
    except ValueError as error:
        if not str(error):
            raise AssertionError("refused without a word") from error
        return str(error)
    finally:
        findings.worst = max(findings.worst, tracemalloc.get_traced_memory()[1] - before)
    against = base if read.codec == record.RANKS else None
    bits = pack_bits(unpack_bits(read.bits, read.shape))  # of the weights alone, whatever stands in the padding
    again = record.write_record(bits, read.shape, read.fingerprint, against)
    if not torch.equal(again, given):
        raise AssertionError("accepted, but it is not the record of its mask")
    return None


def _try_file(random: Random, good: list[Good], path: Path) -> str | None:
    """The same for a file of some records, some of them mutants, as `Masks.load` reads it."""
    chosen = random.sample([one for one in good if one.data[5] != record.RANKS], 3)
    records = [mutant(random, one, good) if random.random() < 0.3 else one.data for one in chosen]
    header, offset = {}, 0
    for index, data in enumerate(records):
        header[f"base_model.model.m{index}.peft_mask_bits"] = {
            "dtype": "U8",
            "shape": [len(data)],
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    content = join(header, b"".join(records))
    if random.random() < 0.7:
        content = random.choice((flip, cut, splice_header))(random, content)
    path.write_bytes(content)
    try:
        masks, _ = read_masks(path)
        names = list(Masks.load(path))
    except ValueError as error:
        return str(error).replace(str(path), "the file")
    written = [mask.record.numpy().tobytes() for mask in masks.values()]
    if names != list(masks) or not all(data in content for data in written):
        raise AssertionError("accepted, but the file does not hold the records of its masks")
    return None


# ---- mutations ----


def mutant(random: Random, one: Good, good: list[Good]) -> bytes:
    """A record with one to three mutations, mostly with its checksum made right again."""
    data = one.data
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(MUTATIONS)(random, data, good)
    return seal(data) if len(data) >= 4 and random.random() < 0.85 else data


def flip(random: Random, data: bytes, good: object = None) -> bytes:
    """Flip a few bits."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def flip_payload(random: Random, data: bytes, good: object = None) -> bytes:
    """Flip a few bits behind the header."""
    start = 48 + 4 * data[6] if len(data) > 6 else 0
    return data[:start] + flip(random, data[start:])


def cut(random: Random, data: bytes, good: object = None) -> bytes:
    """Leave out a piece, at the end or anywhere."""
    start = random.randrange(len(data) + 1)
    return data[:start] if random.random() < 0.5 else data[:start] + data[start + random.randrange(1, 9) :]


def grow(random: Random, data: bytes, good: object = None) -> bytes:
    """Put a few bytes in, or many."""
    at = random.choice((len(data) - 4, random.randrange(len(data) + 1)))
    piece = random.choice((bytes(1), b"\xff", random.randbytes(4), bytes(random.randrange(2000)), b"\xff" * 999))
    return data[: max(at, 0)] + piece + data[max(at, 0) :]


def splice(random: Random, data: bytes, good: list[Good]) -> bytes:
    """Go on with another record, from the same place or from its payload on."""
    other = random.choice(good).data
    at = random.randrange(len(data) + 1)
    return data[:at] + other[min(at, len(other)) :]


def change_field(random: Random, data: bytes, good: object = None) -> bytes:
    """Put a boundary value into a field of the header."""
    dimensions = data[6] if len(data) > 6 else 0
    fields = [(4, "B"), (5, "B"), (6, "B"), (7, "B"), (8 + 4 * dimensions, "Q")]
    fields += [(8 + 4 * i, "I") for i in range(min(dimensions, 8))]
    fields += [(16 + 4 * dimensions + 2 * i, "H") for i in range(16)]
    at, kind = random.choice(fields)
    size = struct.calcsize(kind)
    if at + size > len(data):
        return data
    (old,) = struct.unpack_from(f"<{kind}", data, at)
    top = (1 << 8 * size) - 1
    new = random.choice(
        (0, 1, 2, old + 1, old - 1, old * 2, old ^ 0x80, top, top - 1, top >> 1, random.randint(0, top))
    )
    return data[:at] + struct.pack(f"<{kind}", new & top) + data[at + size :]


def recode(random: Random, data: bytes, good: object = None) -> bytes:
    """Write a payload of gaps anew: other widths, other gaps, another number; what only decoding can find wrong."""
    if len(data) < 60 or data[5] != record.GAPS or data[6] > 8 or not data[6] >= 1:
        return data
    start = 48 + 4 * data[6]
    sizes = struct.unpack_from(f"<{data[6]}I", data, 8)
    numel = int(np.prod(sizes, dtype=object))
    if not 0 < numel <= 1 << 16:
        return data
    count = random.choice(
        (1, 2, 63, 64, 65, numel // 3, min(int.from_bytes(data[start - 40 : start - 32], "little"), numel))
    )
    positions = sorted(random.sample(range(numel), min(count, numel)))
    gaps = np.diff(np.array(positions, dtype=np.int64), prepend=-1) - 1
    if len(gaps) and random.random() < 0.3:
        gaps[random.randrange(len(gaps))] += random.choice((1, numel, 2**20))
    count = len(gaps)
    zeros = numel - count if random.random() < 0.3 else count
    widths = [random.choice((0, 1, 3, max(numel // max(count, 1), 1).bit_length())) for _ in range(-(-count // BLOCK))]
    payload = gaps_with_widths(gaps, widths, _first_width(numel, count))
    head = data[: start - 40] + struct.pack("<Q", zeros)
    return head + data[start - 32 : start] + payload + bytes(4)


def other_codec(random: Random, data: bytes, good: object = None) -> bytes:
    """Write the mask of a good portable record as bits, whether these are shorter or not, perhaps with padding set."""
    try:
        read = record.read_record(as_tensor(data))
    except ValueError:
        return data
    bits = read.bits.numpy().copy()
    if bits.size and random.random() < 0.3:
        bits[random.randrange(len(bits)), -1] |= 0x80
    start, zeros = 8 + 4 * data[6], data[8 + 4 * data[6] : 16 + 4 * data[6]]
    if random.random() < 0.5:  # as many as the bits say, padding included
        zeros = struct.pack("<Q", (math.prod(read.shape) - int(np.unpackbits(bits).sum())) % 2**64)
    return data[:5] + b"\0" + data[6:start] + zeros + data[start + 8 : start + 40] + bits.tobytes() + bytes(4)


def gaps_with_widths(gaps: np.ndarray, widths: list[int], before: int) -> bytes:
    """Code gaps as docs/format.md says, but with any widths."""
    bits: list[int] = []
    for width in widths:
        step, before = width - before, width
        bits += [0] * (2 * step if step >= 0 else -2 * step - 1) + [1]
    each = [widths[i // BLOCK] for i in range(len(gaps))]
    for gap, width in zip(gaps.tolist(), each, strict=True):
        bits += [0] * min(gap >> width, 1 << 16) + [1]
    for plane in range(max(each, default=0)):
        bits += [gap >> plane & 1 for gap, width in zip(gaps.tolist(), each, strict=True) if width > plane]
    return np.packbits(np.array(bits, dtype=np.uint8), bitorder="little").tobytes()


def _first_width(numel: int, count: int) -> int:
    width = 0
    while count and 25 * count << width < 12 * numel - 6 * count:
        width += 1
    return width


def splice_header(random: Random, content: bytes, good: object = None) -> bytes:
    """Change an entry of a safetensors header."""
    header, tensors = split(content)
    entry = header[random.choice(list(header))]
    name = random.choice(("dtype", "shape", "data_offsets"))
    entry[name] = random.choice(
        ("U8", "I8", "F32", "BOOL", "", [0], [1, 1], [2**63], [-1], [0, 2**63], [4, 0], [0, len(tensors)], None, {})
    )
    return join(json.dumps(header).encode(), tensors)


MUTATIONS: tuple[Callable[[Random, bytes, list[Good]], bytes], ...] = (
    flip,
    flip_payload,
    flip_payload,
    cut,
    grow,
    splice,
    change_field,
    change_field,
    recode,
    recode,
    other_codec,
)


def _without_figures(reason: str) -> str:
    reason = re.sub(r"'[^']*'|\([^()]*\)|\b[0-9a-f]{64}\b", "...", reason)
    return re.sub(r"\d+(x\d+)*", "N", reason)[:110]
