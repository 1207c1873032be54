"""Positions in a byte each: the same positions again, wherever they lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.scores.packed_positions import in_full, pack_positions, packed_bytes, unpack_positions


@given(st.integers(1, 2000), st.data())
def test_they_come_back(numel, data):
    positions = sorted(data.draw(st.sets(st.integers(0, numel - 1), max_size=min(numel, 600))))
    for dtype in (torch.int32, torch.int64):
        packed = pack_positions(torch.tensor(positions, dtype=dtype), numel)
        assert packed.dtype == torch.uint8
        assert len(packed) == packed_bytes(len(positions), numel)
        assert unpack_positions(packed, numel).tolist() == positions


def test_a_block_may_be_full_and_others_empty():
    positions = torch.arange(512, 768, dtype=torch.int32)
    assert torch.equal(unpack_positions(pack_positions(positions, 5000), 5000), positions)


def test_a_tenth_of_a_large_weight_takes_a_quarter_of_what_integers_take():
    assert packed_bytes(100_000, 1_000_000) < 1.08 * 100_000


def test_what_is_not_packed_is_returned_as_it_is():
    positions = torch.tensor([1, 5], dtype=torch.int32)
    assert in_full(positions, 9) is positions


def test_without_values_the_length_is_known():
    packed = pack_positions(torch.arange(7, device="meta"), 3000)
    assert packed.is_meta
    assert len(packed) == packed_bytes(7, 3000)
