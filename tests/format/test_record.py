"""Record files: golden bytes, one record for each mask, and a reader that refuses everything else."""

import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mask.format import payload
from peft_mask.format.blocks import blocks_from_one, may_have_blocks, one_a_block, unit_of
from peft_mask.format.fingerprint import UNKNOWN, fingerprint_of
from peft_mask.format.groups import decode_groups, encode_groups, may_have_groups
from peft_mask.format.packing import count_zeros, pack_bits, unpack_bits
from peft_mask.format.payload import BITS, BLOCKS, GAPS, GROUPS
from peft_mask.format.record import frame_bytes, read_record, write_record
from tests.golden.make import MASKS, fingerprint_for, record_for, weight_of
from tests.independent_decoder import decode

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = [*itertools.product(range(4), range(18)), (0,), (7,), (40, 40), (2, 3, 5), (1, 2, 1, 2, 1, 2, 1, 2)]


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def golden(name):
    return (GOLDEN / f"{name}.record").read_bytes()


def assert_flips_are_refused_or_another_record(record, shape):
    """Flip every bit, under a right checksum; the shape is expected, or one of its bits would stand for gigabytes."""
    data = bytearray(record)
    for bit in range(8 * (len(data) - 4)):
        data[bit // 8] ^= 1 << bit % 8
        forged = tensor(sealed(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
        try:
            read = read_record(forged, shape)
        except ValueError:
            continue
        assert torch.equal(write_record(read.bits, read.shape, read.fingerprint), forged)


def sealed(data):
    """The record with its checksum made right again, as a forger would."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def edited(name, offset, new):
    data = bytearray(golden(name))
    data[offset : offset + len(new)] = new
    return sealed(bytes(data))


@pytest.mark.parametrize("name", MASKS)
class TestGolden:
    def test_writing_gives_the_golden_bytes(self, name):
        assert record_for(name) == golden(name)

    def test_reading_gives_the_mask(self, name):
        record = read_record(tensor(golden(name)))
        assert record.shape == MASKS[name].shape
        assert torch.equal(unpack_bits(record.bits, record.shape), MASKS[name])
        assert record.zeros == int((~MASKS[name]).sum())
        assert record.fingerprint == fingerprint_for(name)
        assert record.fingerprint.matches(weight_of(MASKS[name]))

    def test_the_independent_decoder_agrees(self, name):
        shape, mask, precision, values = decode(golden(name))
        assert shape == MASKS[name].shape
        assert mask == MASKS[name].flatten().tolist()
        assert precision == fingerprint_for(name).precision
        assert struct.pack("<16e", *values) == fingerprint_for(name).values

    def test_every_flipped_bit_is_refused(self, name):
        data = bytearray(golden(name))
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError, match=r"^it|^its"):
                read_record(tensor(data))
            data[bit // 8] ^= 1 << bit % 8

    def test_every_flipped_bit_under_a_right_checksum_is_refused_or_another_record(self, name):
        assert_flips_are_refused_or_another_record(golden(name), MASKS[name].shape)

    def test_every_truncation_and_extension_is_refused(self, name):
        data = golden(name)
        for length in range(len(data)):
            for cut in (data[:length], sealed(data[: length + 4])):
                if cut == data:
                    continue
                with pytest.raises(ValueError, match=r"^it|^its|^the coded|coded bytes|weights need"):
                    read_record(tensor(cut))
        for longer in (data + b"\0", sealed(data + b"\0"), sealed(data + b"\1"), data + data):
            with pytest.raises(ValueError, match=r"^it|^its|^the coded|weights need"):
                read_record(tensor(longer))


def test_the_golden_masks_are_of_both_codecs():
    codecs = {name: read_record(tensor(golden(name))).codec for name in MASKS}
    assert codecs.pop("packed") == codecs.pop("no_weights") == BITS
    assert set(codecs.values()) == {GAPS}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reading_restores_what_was_written(shape):
    fingerprint = fingerprint_of(torch.randn(shape))
    for sparsity in (0.0, 0.02, 0.3, 0.5, 0.95, 1.0):
        mask = torch.rand(shape) >= sparsity
        data = write_record(pack_bits(mask), shape, fingerprint)
        record = read_record(data, shape)
        assert torch.equal(unpack_bits(record.bits, shape), mask)
        assert (record.shape, record.fingerprint) == (shape, fingerprint)
        assert record.zeros == count_zeros(record.bits, shape) == int((~mask).sum())
        assert decode(data.numpy().tobytes())[1] == mask.flatten().tolist()


@pytest.mark.parametrize("sparsity", [0.003, 0.03, 0.3, 0.5, 0.7, 0.97])
def test_the_shorter_codec_is_written(sparsity):
    mask = torch.rand(256, 256) >= sparsity
    record = read_record(write_record(pack_bits(mask), mask.shape, UNKNOWN))
    assert record.codec == (BITS if sparsity == 0.5 else GAPS)


def test_an_all_kept_mask_of_any_size_takes_60_bytes():
    bits = pack_bits(torch.ones(300, 1000, dtype=torch.bool))
    assert len(write_record(bits, (300, 1000), UNKNOWN)) == 60


def huge(*shape):
    """A well-formed record of an all-kept mask."""
    body = struct.pack(f"<4s4B{len(shape)}IQ", b"PMSK", 1, GAPS, len(shape), 0, *shape, 0) + bytes(32)
    return body + struct.pack("<I", zlib.crc32(body))


REFUSED = {
    "foreign": (b"PK\3\4" + bytes(80), "it does not begin as a mask of peft_mask does"),
    "empty": (b"", "it does not begin as a mask of peft_mask does"),
    "newer": (edited("vector", 4, b"\3"), "format version 3, written by a newer peft_mask, please upgrade peft_mask"),
    "version 0": (edited("vector", 4, b"\0"), "its header is malformed: version 0"),
    "codec": (edited("vector", 5, b"\3"), "its header is malformed: version 1, codec 3"),
    "no dimensions": (huge(), "its header is malformed: .* 0 dimensions"),
    "nine dimensions": (huge(*[1] * 9), "its header is malformed: .* 9 dimensions"),
    "precision": (edited("vector", 7, b"\x0b"), "the precision of a fingerprint is from 0 to 10, got 11"),
    "checksum": (golden("vector")[:-1] + b"!", "its checksum is wrong: the file is damaged or cut short"),
    "cut short": (golden("vector")[:30], "it is cut short, after 30 bytes"),
    "more zeros than weights": (edited("vector", 12, b"\xff\xff"), "it claims 65535 zeros among 200 weights"),
    "fewer bits": (sealed(golden("packed")[:-1]), "7x23 weights need 21 bytes of bits, it has 20"),
    "wrong number of zeros": (edited("packed", 16, b"\x59"), "it claims 89 zeros, its bits have 90"),
    "padding": (edited("packed", -5, bytes([golden("packed")[-5] | 128])), "its padding is not zero"),
    "gaps as long as bits": (edited("packed", 5, b"\1"), "stored as gaps, though bits are not longer"),
    "bits though gaps are shorter": (
        sealed(edited("all_off", 5, b"\0")[:-4] + bytes(27) + b"CRC!"),
        "stored as bits, though gaps are shorter",
    ),
    "too large": (huge(2**20, 2**20), "its shape is 1048576x1048576, which is too large to be believed"),
    "too large and empty": (
        huge(0, 2**32 - 1, 2**32 - 1),
        "its shape is 0x4294967295x4294967295, which is too large to be believed",
    ),
    "too large in bytes": (huge(2**32 - 1, 1), "its shape is 4294967295x1, which is too large to be believed"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_record_is_refused_with_its_reason(data, message):
    with pytest.raises(ValueError, match=message):
        read_record(tensor(data))


def test_another_shape_than_expected_is_refused_before_anything_is_allocated():
    with pytest.raises(ValueError, match="its shape is 1048576x1048576, expected 3x4"):
        read_record(tensor(huge(2**20, 2**20)), (3, 4))


def test_records_of_another_dtype_or_shape_are_refused():
    with pytest.raises(ValueError, match=r"one dimension of uint8, got torch.float32 of shape \(60,\)"):
        read_record(torch.zeros(60))
    with pytest.raises(ValueError, match=r"one dimension of uint8, got torch.uint8 of shape \(6, 10\)"):
        read_record(torch.zeros(6, 10, dtype=torch.uint8))


def test_a_mask_of_nine_dimensions_is_not_written():
    with pytest.raises(ValueError, match="a mask has at most 8 dimensions, got 1x1x1x1x1x1x1x1x2"):
        write_record(torch.ones(1, 1, dtype=torch.uint8), [1] * 8 + [2], UNKNOWN)


# ---- version 2: masks with structure ----

STRUCTURED_MASKS = {
    "rows": torch.rand(64, 1, generator=torch.Generator().manual_seed(0)).ge(0.2).expand(64, 30),
    "columns": torch.rand(1, 40, generator=torch.Generator().manual_seed(1)).ge(0.5).expand(60, 40),
    "heads": torch.tensor([True, False, True, True]).repeat_interleave(16).unsqueeze(1).expand(64, 30),
    "filters": torch.rand(24, 1, 1, 1, generator=torch.Generator().manual_seed(2)).ge(0.5).expand(24, 3, 3, 3),
    "2:4": torch.rand(20, 12, 4, generator=torch.Generator().manual_seed(3)).argsort(-1).lt(2).view(20, 48),
    "2:4 along rows": torch.rand(20, 12, 4, generator=torch.Generator().manual_seed(4))
    .argsort(-1)
    .lt(2)
    .view(20, 48)
    .t(),
    "3:5": torch.rand(30, 10, 5, generator=torch.Generator().manual_seed(5)).argsort(-1).lt(3).view(30, 50),
}


@pytest.mark.parametrize("name", STRUCTURED_MASKS)
class TestStructure:
    def record(self, name):
        mask = STRUCTURED_MASKS[name]
        return write_record(pack_bits(mask), mask.shape, UNKNOWN)

    def test_it_is_stored_at_one_bit_a_unit_and_comes_back(self, name):
        mask, data = STRUCTURED_MASKS[name], self.record(name)
        record = read_record(data, mask.shape)
        assert torch.equal(unpack_bits(record.bits, mask.shape), mask)
        assert data[4] == 2
        assert record.codec == (GROUPS if ":" in name else BLOCKS)
        units = {"rows": 64, "columns": 40, "heads": 4, "filters": 24, "2:4": 640, "2:4 along rows": 640, "3:5": 1000}
        head = 3 if ":" in name else 4 * mask.dim() + 1
        assert len(data) <= frame_bytes(mask.shape) + head + math.ceil(units[name] / 8)

    def test_the_independent_decoder_agrees(self, name):
        mask = STRUCTURED_MASKS[name]
        assert decode(self.record(name).numpy().tobytes())[:2] == (tuple(mask.shape), mask.flatten().tolist())

    def test_every_flipped_bit_under_a_right_checksum_is_refused_or_another_record(self, name):
        assert_flips_are_refused_or_another_record(self.record(name).numpy().tobytes(), STRUCTURED_MASKS[name].shape)

    def test_every_truncation_and_extension_is_refused(self, name):
        data = self.record(name).numpy().tobytes()
        for cut in (*(sealed(data[: length + 4]) for length in range(len(data) - 4)), sealed(data + b"\0")):
            with pytest.raises(ValueError, match=r"^it|^its|^the coded|coded bytes|weights need"):
                read_record(tensor(cut), STRUCTURED_MASKS[name].shape)

    def test_version_1_readers_are_told_to_upgrade_and_its_records_still_read(self, name, monkeypatch):
        mask = STRUCTURED_MASKS[name]
        monkeypatch.setattr(payload, "_structured", lambda *_: [])
        old = write_record(pack_bits(mask), mask.shape, UNKNOWN)
        monkeypatch.undo()
        assert old[4] == 1
        assert torch.equal(unpack_bits(read_record(old, mask.shape).bits, mask.shape), mask)
        monkeypatch.setattr("peft_mask.format.record.VERSION", 1)
        with pytest.raises(ValueError, match="it has format version 2, written by a newer peft_mask, please upgrade"):
            read_record(self.record(name), mask.shape)


@pytest.mark.parametrize("version", [1, 2])
def test_a_codec_of_another_version_is_refused(version):
    data = bytearray(write_record(pack_bits(STRUCTURED_MASKS["rows"]), (64, 30), UNKNOWN).numpy().tobytes())
    data[4:6] = version, GAPS if version == 2 else BLOCKS
    with pytest.raises(ValueError, match="its header is malformed: version"):
        read_record(tensor(sealed(bytes(data))))


def test_blocks_that_are_not_the_largest_are_refused():
    mask = STRUCTURED_MASKS["heads"]  # blocks of 16 rows, here told in blocks of 8
    good = write_record(pack_bits(mask), mask.shape, UNKNOWN).numpy().tobytes()
    small = mask[::8, :1].contiguous()
    bits, zeros = pack_bits(small), int((~small).sum())
    codec, coded = payload._plain(bits, small.shape, payload._rarer_positions(bits, small.shape, zeros))
    forged = good[: 48 + 4 * 2] + struct.pack("<2IB", 8, 30, codec) + coded + bytes(4)
    with pytest.raises(ValueError, match="it is not stored in the shortest way"):
        read_record(tensor(sealed(forged)), mask.shape)


def test_a_structured_record_of_no_expected_shape_may_not_claim_gigabytes():
    data = bytearray(write_record(pack_bits(STRUCTURED_MASKS["rows"]), (64, 30), UNKNOWN).numpy().tobytes())
    data[8:16] = struct.pack("<2I", 1 << 20, 1 << 12)
    with pytest.raises(ValueError, match="its shape is 1048576x4096, which is too large to be believed"):
        read_record(tensor(sealed(bytes(data))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_blocks_are_the_largest_and_restore_the_mask(small_shape, data):
    unit = [data.draw(st.integers(1, 4)) for _ in small_shape]
    small = np.array(
        data.draw(st.lists(st.booleans(), min_size=math.prod(small_shape), max_size=math.prod(small_shape)))
    )
    mask = blocks_from_one(small.reshape(small_shape), unit)
    found = unit_of(mask)
    for positions in (np.flatnonzero(mask), np.flatnonzero(~mask)):
        assert not len(positions) or may_have_blocks(positions, mask.shape) or math.prod(found) == 1
    assert all(step % given == 0 for step, given in zip(found, unit, strict=True))
    assert np.array_equal(blocks_from_one(one_a_block(mask, found), found), mask)
    for axis, step in enumerate(found):  # no larger one would do
        for larger in range(2 * step, mask.shape[axis] + 1, step):
            if mask.shape[axis] % larger == 0:
                wider = [*found[:axis], larger, *found[axis + 1 :]]
                assert not np.array_equal(blocks_from_one(one_a_block(mask, wider), wider), mask)


def test_masks_of_single_weights_are_not_looked_at_for_structure():
    mask = np.ones((64, 64), bool)
    mask[10, 3] = mask[40, 50] = False
    assert not may_have_blocks(np.flatnonzero(~mask), mask.shape)
    assert not may_have_groups(int(mask.sum()), mask.size)
    assert may_have_groups(mask.size * 31 // 32, mask.size)


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (4, 8), (1, 16), (8, 16), (16, 32), (31, 32)])
def test_groups_of_every_size_come_back_in_less_than_a_bit_a_weight(pattern):
    kept, size = pattern
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 8, size, generator=generator).argsort(-1).lt(kept).view(3, -1).numpy()
    coded = encode_groups(mask)
    assert np.array_equal(decode_groups(coded, mask.shape), mask)
    ways = math.comb(size, kept)
    # at most 7 bits more than the least for all of them in one number, or 0.1 bit a weight more
    assert 8 * (len(coded) - 3) <= max(24 * math.log2(ways) + 64, (math.log2(ways) / size + 0.1) * mask.size)
