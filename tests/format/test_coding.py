"""Positions <-> bytes: exact inverses, one byte string for each set, and close to the entropy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.format.coding import coded_size, decode_gaps, encode_gaps


def positions_of(mask):
    return np.flatnonzero(np.asarray(mask))


def random_positions(size, rate, seed=0):
    return positions_of(np.random.default_rng(seed).random(size) < rate)


@pytest.mark.parametrize("size", range(11))
def test_decoding_restores_every_set_of_positions(size):
    for mask in itertools.product((False, True), repeat=size):
        positions = positions_of(mask)
        assert np.array_equal(decode_gaps(encode_gaps(positions, size), len(positions), size), positions)


@given(st.sets(st.integers(0, 2**34 - 1), max_size=300), st.integers(0, 40))
def test_decoding_restores_positions_of_any_spread(chosen, shift):
    size = (1 << 34 >> shift) + 1
    positions = np.unique(np.array(sorted(chosen), np.int64) % size)
    data = encode_gaps(positions, size)
    assert np.array_equal(decode_gaps(data, len(positions), size), positions)
    assert len(data) == coded_size(positions, size)


@pytest.mark.parametrize("count", [63, 64, 65, 127, 128, 129, 640])
def test_decoding_restores_blocks_whole_and_cut(count):
    positions = np.cumsum(np.random.default_rng(count).integers(1, 2 + np.arange(count) ** 2))
    size = int(positions[-1]) + 1
    assert np.array_equal(decode_gaps(encode_gaps(positions, size), count, size), positions)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_whatever_decodes_is_what_encoding_writes(size):
    """Of all strings of up to ten bits, exactly the canonical ones are accepted."""
    strings = {
        b"",
        *(bytes([low]) for low in range(256)),
        *(bytes([low, high]) for low in range(256) for high in range(4)),
    }
    for count in range(min(size, 4) + 1):
        accepted = set()
        for data in strings:
            try:
                positions = decode_gaps(data, count, size)
            except ValueError:
                continue
            assert encode_gaps(positions, size) == data
            accepted.add(data)
        chosen = (np.array(positions, np.int64) for positions in itertools.combinations(range(size), count))
        assert accepted == strings & {encode_gaps(positions, size) for positions in chosen}


@given(st.binary(max_size=60), st.integers(0, 500), st.integers(1, 2**40))
def test_random_bytes_are_refused_or_canonical(data, count, size):
    try:
        positions = decode_gaps(data, count, size)
    except ValueError:
        return
    assert encode_gaps(positions, size) == data


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_gives_other_positions_or_none(seed):
    positions, size = random_positions(3000, 0.05, seed), 3000
    data = encode_gaps(positions, size)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            other = decode_gaps(bytes(flipped), len(positions), size)
        except ValueError:
            continue
        assert not np.array_equal(other, positions)


REFUSED = {
    "too few bytes": (b"\x01", 9, 100, "1 coded bytes are too few for 9 positions"),
    "no end of a number": (b"\x01\x00", 1, 100, "the coded positions end early"),
    "trailing byte": (encode_gaps(np.array([2, 3, 9]), 16) + b"\0", 3, 16, "the coded positions end early or late"),
    "bytes for no position": (b"\0", 0, 16, "the coded positions end early or late"),
    "width below zero": (b"\x06", 1, 1, "the coded positions have an impossible width"),
    "quotient beyond the last place": (b"\x09", 1, 3, "a coded position is out of range"),
    "remainder beyond the last place": (b"\x0d", 1, 3, "a coded position is out of range"),
    "width not by the rule": (b"\x0c", 1, 2, "the coded positions are not in their canonical form"),
    "padding": (b"\x83", 1, 1, "the coded positions are not in their canonical form"),
}


@pytest.mark.parametrize(("data", "count", "size", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_damage_is_refused_with_its_reason(data, count, size, message):
    with pytest.raises(ValueError, match=message):
        decode_gaps(data, count, size)


@pytest.mark.parametrize("rate", [0.003, 0.01, 0.03, 0.1, 0.3])
def test_coded_size_is_close_to_the_entropy_of_independent_zeros(rate):
    size = 1_000_000
    positions = random_positions(size, rate)
    p = len(positions) / size
    entropy = -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * coded_size(positions, size) < 1.02 * entropy


def test_coded_size_gains_from_rows_of_uneven_density():
    rates = 0.02 * torch.randn(1000, 1).exp()
    mask = torch.rand(1000, 1000) < rates
    p = mask.float().mean().item()
    entropy = -mask.numel() * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * coded_size(positions_of(mask.flatten()), mask.numel()) < 0.98 * entropy
