"""A fingerprint of a weight: sixteen of its values, enough to tell whether a mask meets the base it was made for.

A mask on another base is silently garbage, but the same base in another dtype, or quantised, is the right one:
so the fingerprint holds values, not a hash, and they are compared with a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_mask.tensors.elements import take

SAMPLES = 16
EXACT, QUANTIZED = 7, 1  # precisions: bfloat16 rounding errs by 2^-9 at most, 4-bit formats by about 2^-3
_FLOAT16_MAX = 65504.0
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Fingerprint:
    """Sampled values of a weight.

    Attributes:
        values: the 16 samples as little-endian float16, 32 bytes.
        precision: k; the values are known within a relative 2^-k. 0: nothing is known, and every weight agrees.

    Raises:
        ValueError: a value is not finite, their number is not 16, or k is not from 0 to 10.
    """

    values: bytes
    precision: int

    def __post_init__(self) -> None:
        if len(self.values) != 2 * SAMPLES or not np.isfinite(self._samples()).all():
            raise ValueError(f"a fingerprint holds {SAMPLES} finite float16 values, got {self.values.hex()}")
        if not 0 <= self.precision <= 10:
            raise ValueError(f"the precision of a fingerprint is from 0 to 10, got {self.precision}")

    def agrees_with(self, other: Fingerprint) -> bool:
        """Whether both can be of one weight: ||a - b|| <= 2^-k max(||a||, ||b||) + 2^-22, with k the lower precision.

        The last term is what rounding to float16 can make of weights too small for it.
        """
        precision = min(self.precision, other.precision)
        a, b = self._samples(), other._samples()
        tolerance = 2.0**-precision * max(np.linalg.norm(a), np.linalg.norm(b)) + 2.0**-22
        return precision == 0 or bool(np.linalg.norm(a - b) <= tolerance)

    def matches(self, weight: Tensor, *, exact: bool | None = None) -> bool:
        """Whether `weight` can be the weight this fingerprint was taken from.

        True for the same weight rounded to float32, bfloat16, float16, or (then k = 1) dequantized from 8 or 4 bits.
        False for an unrelated weight and, unless quantized, for one that was changed by more than about 1 %. The
        arguments are those of `fingerprint_of`.
        """
        return self.agrees_with(fingerprint_of(weight, exact=exact))

    def _samples(self) -> NDArray[np.float64]:
        return np.frombuffer(self.values, "<f2").astype(np.float64)


UNKNOWN = Fingerprint(bytes(2 * SAMPLES), 0)


def fingerprint_of(weight: Tensor, *, exact: bool | None = None) -> Fingerprint:
    """Take the fingerprint of a weight.

    The samples are the elements at the row-major positions `splitmix64(i) mod numel`, i = 0..15, rounded to float16;
    values beyond its range become its largest, NaN becomes 0. An empty weight has sixteen zeros.

    Args:
        weight: any shape, strides, device and real dtype; quantized weights come dequantized.
        exact: whether the values are free of quantization error, which makes k = 7 and not 1. By default floating-point
            dtypes of 16 bits and more are.

    Raises:
        ValueError: the weight is on the meta device and has no values.
    """
    if weight.is_meta:
        raise ValueError(
            "cannot take the fingerprint of a weight on the meta device, which has no values: load the weights first"
        )
    if exact is None:
        exact = weight.is_floating_point() and weight.dtype.itemsize > 1
    values = torch.zeros(SAMPLES)
    if weight.numel():
        positions = torch.tensor(sample_positions(weight.numel()), device=weight.device)
        values = take(weight.detach(), positions).to("cpu", torch.float64)
    values = values.nan_to_num(0.0).clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return Fingerprint(values.numpy().astype("<f2").tobytes(), EXACT if exact else QUANTIZED)


def sample_positions(numel: int) -> list[int]:
    """Positions of the samples in a weight of `numel` elements; they may repeat.

    The first sixteen outputs of SplitMix64 from state 0, each modulo `numel`.
    Source: https://prng.di.unimi.it/splitmix64.c

    >>> sample_positions(1000)[:3]
    [535, 700, 679]
    """
    return [_splitmix64(i) % numel for i in range(SAMPLES)]


def _splitmix64(i: int) -> int:
    z = (i + 1) * 0x9E3779B97F4A7C15 & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31
