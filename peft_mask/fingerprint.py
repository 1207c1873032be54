"""A fingerprint of a weight: sixteen of its values, enough to tell whether a mask meets the base it was made for.

A mask on another base is silently garbage, but the same base in another dtype, or quantised, is the right one:
so the fingerprint holds values, not a hash, and they are compared with a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAMPLES = 16
EXACT, QUANTIZED = 7, 1  # precisions: bfloat16 rounding errs by 2^-9 at most, 4-bit formats by about 2^-3
_FLOAT16_MAX = 65504.0
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Fingerprint:
    """Sampled values of a weight.

    Attributes:
        values: the 16 samples as little-endian float16, 32 bytes.
        precision: k; the values are known within a relative 2^-k.
    """

    values: bytes
    precision: int

    def __post_init__(self) -> None:
        if len(self.values) != 2 * SAMPLES:
            raise ValueError(f"a fingerprint has {2 * SAMPLES} bytes of values, got {len(self.values)}")
        if not 0 <= self.precision <= 255:
            raise ValueError(f"the precision of a fingerprint is from 0 to 255, got {self.precision}")

    def matches(self, weight: Tensor, *, exact: bool | None = None) -> bool:
        """Whether `weight` is the weight this fingerprint was taken from, but for rounding.

        With a the samples of `weight`, b those kept here and k the lower precision of the two:
        ||a - b|| <= 2^-k ||b||.

        Args:
            weight: as in `fingerprint_of`.
            exact: as in `fingerprint_of`.

        Returns:
            True for the same weight in float32, bfloat16, float16 or (k = 1) dequantized from 8 or 4 bits; False for
            an unrelated weight, and, unless quantized, for one changed by more than about 1 %.
        """
        other = fingerprint_of(weight, exact=exact)
        a, b = other.samples(), self.samples()
        tolerance = 2.0 ** -min(self.precision, other.precision)
        return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b))

    def samples(self) -> np.ndarray:
        """The values as float64, NaN (which no writer makes) as 0."""
        return np.nan_to_num(np.frombuffer(self.values, "<f2").astype(np.float64))


def fingerprint_of(weight: Tensor, *, exact: bool | None = None) -> Fingerprint:
    """Take the fingerprint of a weight.

    The samples are the elements at row-major positions `splitmix64(i) mod numel`, i = 0..15, as float16; values beyond
    its range are clamped to it and NaN is stored as 0. An empty weight has sixteen zeros.

    Args:
        weight: any shape, strides, device and real dtype; quantized weights come dequantized.
        exact: whether the values are free of quantization error. Default: by dtype (float16 and wider are).

    Raises:
        ValueError: the weight is on the meta device and has no values.
    """
    if weight.is_meta:
        raise ValueError(
            "cannot take the fingerprint of a weight on the meta device: it has no values. "
            "Load the weights first, or switch the check off with check_base=False."
        )
    if exact is None:
        exact = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    values = torch.zeros(SAMPLES)
    if weight.numel():
        index = torch.tensor(sample_positions(weight.numel()), device=weight.device)
        values = _take(weight.detach(), index).to("cpu", torch.float64)
    values = values.nan_to_num(0.0, _FLOAT16_MAX, -_FLOAT16_MAX).clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return Fingerprint(values.numpy().astype("<f2").tobytes(), EXACT if exact else QUANTIZED)


def sample_positions(numel: int) -> list[int]:
    """Positions of the samples in a weight of `numel` elements; they may repeat.

    The first sixteen outputs of SplitMix64 from state 0, each modulo `numel`.
    Source: https://prng.di.unimi.it/splitmix64.c

    >>> sample_positions(1000)[:3]
    [375, 164, 329]
    """
    return [_splitmix64(i) % numel for i in range(SAMPLES)]


def _splitmix64(i: int) -> int:
    z = (i + 1) * 0x9E3779B97F4A7C15 & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31


def _take(weight: Tensor, index: Tensor) -> Tensor:
    if weight.dtype.itemsize == 1:  # float8 has no indexing of its own
        return weight.view(torch.uint8).take(index).view(weight.dtype)
    return weight.take(index)
