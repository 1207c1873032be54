"""Packed masks of a layer: the positions of their zeros are kept for as long as they are right."""

import torch

from peft_mask.format.packing import pack_bits
from peft_mask.layers.bits import BitsDict


def mask(*off):
    kept = torch.ones(4, 10, dtype=torch.bool)
    kept.view(-1)[list(off)] = False
    return pack_bits(kept)


def test_positions_are_found_once_and_anew_for_other_bits():
    bits = BitsDict()
    bits["a"] = mask(3, 17)
    first = bits.zero_positions("a", (4, 10))
    assert first.tolist() == [3, 17]
    assert first.dtype == torch.int32
    assert bits.zero_positions("a", (4, 10)) is first
    bits["a"].copy_(mask(5))
    assert bits.zero_positions("a", (4, 10)).tolist() == [5]
    other = mask(1)
    other.add_(0)  # as often written to as the bits whose place it takes
    assert other._version == bits["a"]._version
    bits["a"] = other
    assert bits.zero_positions("a", (4, 10)).tolist() == [1]


def test_bits_without_a_version_are_looked_at_every_time():
    bits = BitsDict()
    with torch.inference_mode():
        bits["a"] = mask(3)
        assert bits.zero_positions("a", (4, 10)).tolist() == [3]
        bits["a"].copy_(mask(5))
        assert bits.zero_positions("a", (4, 10)).tolist() == [5]


def test_what_is_deleted_is_not_kept():
    bits = BitsDict()
    bits["a"] = mask(3)
    bits.zero_positions("a", (4, 10))
    del bits["a"]
    assert not bits._known_zeros
