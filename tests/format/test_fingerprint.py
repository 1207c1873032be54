"""The fingerprint accepts the same weight in other clothes and refuses another weight."""

import math

import pytest
import torch

from peft_mask.format.fingerprint import UNKNOWN, Fingerprint, fingerprint_of, sample_positions

SHAPES = [(1,), (3,), (4, 4), (768, 768), (2, 3, 5, 5)]


def quantized(weight, levels):
    scale = weight.abs().max() / levels
    return (weight / scale).round() * scale


@pytest.mark.parametrize("scale", [1e-8, 1e-7, 1e-6, 1e-5, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_weight_in_another_dtype_matches(shape, scale, dtype):
    weight = scale * torch.randn(shape)
    assert fingerprint_of(weight).matches(weight.to(dtype))
    assert fingerprint_of(weight.to(dtype)).matches(weight)


@pytest.mark.parametrize("levels", [7, 127])
def test_the_same_weight_quantized_matches(levels):
    weight = 0.02 * torch.randn(256, 256)
    coarse = quantized(weight, levels)
    assert fingerprint_of(weight).matches(coarse, exact=False)
    assert fingerprint_of(coarse, exact=False).matches(weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_same_weight_in_float8_matches_without_a_word(dtype):
    weight = torch.randn(64, 64)
    assert fingerprint_of(weight.to(dtype)).precision == 1
    assert fingerprint_of(weight).matches(weight.to(dtype))
    assert fingerprint_of(weight).matches(weight.t().to(dtype).t())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(16, 16), (768, 768), (3, 7, 5)], ids=str)
def test_an_unrelated_weight_of_the_same_scale_is_refused(shape, exact):
    for _ in range(50):
        assert not fingerprint_of(torch.randn(shape)).matches(torch.randn(shape), exact=exact)


def test_a_weight_finetuned_by_a_few_per_cent_is_refused():
    for _ in range(50):
        weight = torch.randn(64, 64)
        assert not fingerprint_of(weight).matches(weight + 0.03 * torch.randn(64, 64))


def test_zeros_match_zeros_only():
    zeros = torch.zeros(8, 8)
    assert fingerprint_of(zeros).matches(zeros)
    assert not fingerprint_of(zeros).matches(torch.randn(8, 8))
    assert not fingerprint_of(torch.randn(8, 8)).matches(zeros, exact=False)


def test_the_unknown_fingerprint_matches_everything():
    assert UNKNOWN.matches(torch.randn(3, 3))
    assert fingerprint_of(torch.randn(3, 3)).agrees_with(UNKNOWN)


def test_values_beyond_float16_are_kept_at_its_bounds():
    weight = torch.full((4, 4), math.nan)
    weight[0], weight[1], weight[2] = math.inf, -1e30, 1e30
    fingerprint = fingerprint_of(weight)
    assert set(fingerprint._samples()) <= {0.0, -65504.0, 65504.0}
    assert fingerprint.matches(weight)


def test_strides_do_not_matter():
    weight = torch.randn(30, 20)
    assert fingerprint_of(weight.t().contiguous().t()) == fingerprint_of(weight)
    assert fingerprint_of(torch.randn(60, 40)[::2, 1::2].copy_(weight)) == fingerprint_of(weight)


def test_an_empty_weight_has_a_fingerprint():
    assert fingerprint_of(torch.ones(0, 4)) == Fingerprint(bytes(32), 7)


def test_a_parameter_has_the_fingerprint_of_its_values():
    weight = torch.nn.Parameter(torch.randn(5, 5))
    assert fingerprint_of(weight) == fingerprint_of(weight.detach())


def test_sample_positions_are_those_of_splitmix64():
    # the first outputs for seed 0 of the reference implementation
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert sample_positions(2**64)[:5] == known
    assert sample_positions(1000) == [position % 1000 for position in sample_positions(2**64)]


def test_a_weight_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="weight on the meta device, which has no values: load the weights first"):
        fingerprint_of(torch.empty(3, 3, device="meta"))


@pytest.mark.parametrize(
    ("values", "precision", "message"),
    [
        (bytes(31), 7, "holds 16 finite float16 values"),
        (b"\x00\x7c" + bytes(30), 7, "holds 16 finite float16 values, got 007c"),
        (bytes(32), 11, "the precision of a fingerprint is from 0 to 10, got 11"),
    ],
)
def test_a_malformed_fingerprint_is_refused(values, precision, message):
    with pytest.raises(ValueError, match=message):
        Fingerprint(values, precision)
