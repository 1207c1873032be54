"""Mask <-> bits: exact inverses for every shape, and the layout numpy knows as bitorder="little"."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.format.packing import (
    _pack_on_device,
    bits_from_positions,
    bits_shape,
    count_zeros,
    entropy_bits,
    has_clean_padding,
    kept_at,
    kept_positions,
    kept_ranks,
    pack_bits,
    unpack_bits,
    zero_positions,
)

SHAPES = [*itertools.product(range(4), range(18)), (0,), (1,), (19,), (2, 3, 5), (3, 0, 2), (2, 2, 1, 3)]
SPARSITIES = (0.0, 0.1, 0.5, 0.9, 1.0)


def masks(shape):
    return [torch.rand(shape) >= sparsity for sparsity in SPARSITIES]


def flat_positions(mask):
    return [position for position, value in enumerate(mask.flatten().tolist()) if value]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestEveryShape:
    def test_unpacking_restores_the_mask(self, shape):
        for mask in masks(shape):
            restored = unpack_bits(pack_bits(mask), shape)
            assert torch.equal(restored, mask)
            assert restored.is_contiguous()

    def test_bits_are_those_of_numpy(self, shape):
        for mask in masks(shape):
            matrix = mask.reshape(
                1 if len(shape) == 1 else shape[0], math.prod(shape[-1:] if len(shape) == 1 else shape[1:])
            )
            bits = pack_bits(mask)
            assert bits.shape == bits_shape(shape)
            assert np.array_equal(bits.numpy(), np.packbits(matrix.numpy(), axis=1, bitorder="little"))
            assert torch.equal(_pack_on_device(matrix), bits)
            assert has_clean_padding(bits, shape)

    def test_ranks_are_places_among_the_kept(self, shape):
        for mask in masks(shape):
            bits, kept = pack_bits(mask), np.array(flat_positions(mask), np.int64)
            ranks = np.arange(len(kept))
            assert np.array_equal(kept_at(bits, shape, ranks), kept)
            assert np.array_equal(kept_ranks(bits, shape, kept), ranks)
            assert np.array_equal(kept_at(bits, shape, ranks[::2]), kept[::2])
            everywhere = np.arange(mask.numel())
            assert np.array_equal(kept_ranks(bits, shape, everywhere), np.searchsorted(kept, everywhere))

    def test_positions_and_counts_are_those_of_the_mask(self, shape):
        for mask in masks(shape):
            bits = pack_bits(mask)
            assert zero_positions(bits, shape).tolist() == flat_positions(~mask)
            assert kept_positions(bits, shape).tolist() == flat_positions(mask)
            assert count_zeros(bits, shape) == len(flat_positions(~mask))

    def test_positions_give_the_bits_back(self, shape):
        for mask in masks(shape):
            bits = pack_bits(mask)
            assert torch.equal(bits_from_positions(zero_positions(bits, shape), shape, kept=False), bits)
            assert torch.equal(bits_from_positions(kept_positions(bits, shape), shape, kept=True), bits)


def test_ranks_are_found_across_chunks(monkeypatch):
    monkeypatch.setattr("peft_mask.format.packing._CHUNK", 3)
    for cols in (8, 21):
        for sparsity in SPARSITIES:
            mask = torch.rand(9, cols, generator=torch.Generator().manual_seed(0)) >= sparsity
            bits, kept = pack_bits(mask), mask.view(-1).nonzero().squeeze(1).numpy()
            ranks, everywhere = np.arange(len(kept)), np.arange(mask.numel())
            assert np.array_equal(kept_at(bits, mask.shape, ranks), kept)
            assert np.array_equal(kept_at(bits, mask.shape, ranks[1::3]), kept[1::3])
            assert np.array_equal(kept_ranks(bits, mask.shape, everywhere), np.searchsorted(kept, everywhere))


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 20))
def test_unpacking_restores_any_mask(values, cols):
    mask = torch.tensor(values)[: len(values) // cols * cols].view(-1, cols)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


def test_a_transposed_mask_is_packed_as_its_contiguous_copy():
    mask = (torch.rand(7, 21) < 0.5).t()
    assert torch.equal(pack_bits(mask), pack_bits(mask.contiguous()))


def test_the_first_weight_is_the_lowest_bit():
    assert pack_bits(torch.tensor([True] + 8 * [False] + [True])).tolist() == [[1, 2]]


def test_padding_that_is_set_is_seen():
    bits = pack_bits(torch.ones(2, 3, dtype=torch.bool))
    bits[1, 0] |= 8
    assert not has_clean_padding(bits, (2, 3))


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match="a mask needs at least one dimension, got a scalar"):
        pack_bits(torch.tensor(True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 29), (64, 128), (0, 3), (17,)], ids=str)
def test_a_gpu_packs_and_unpacks_as_the_cpu_does(shape):
    for mask in masks(shape):
        bits, there = pack_bits(mask), pack_bits(mask.cuda())
        assert there.is_cuda
        assert torch.equal(there.cpu(), bits)
        assert torch.equal(unpack_bits(there, shape).cpu(), mask)
        zeros = zero_positions(there, shape)
        assert torch.equal(zeros.cpu(), zero_positions(bits, shape))
        assert torch.equal(bits_from_positions(zeros, shape, kept=False), there)
        assert count_zeros(there, shape) == count_zeros(bits, shape)


def test_entropy_of_masks():
    assert entropy_bits(0, 8) == entropy_bits(8, 8) == entropy_bits(0, 0) == 0.0
    assert entropy_bits(4, 8) == 8.0
    assert entropy_bits(50, 1000) == pytest.approx(286.4, abs=0.1)
