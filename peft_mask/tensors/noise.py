"""Random numbers without state: a function of a key and of the tensor they are drawn for.

A mask that is drawn anew in training must be the same mask when gradient checkpointing computes a layer again, in every
process that trains the same scores, and in a run that was resumed. A generator would have to be saved, copied and wound
back for that. Here the numbers follow from the scores themselves, which all of these have in common: they are others
after every step of the optimizer, and nothing has to be kept.
"""

from __future__ import annotations

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def uniform_like(values: torch.Tensor, key: int) -> torch.Tensor:
    """Return numbers that look drawn from U[0, 1), one for each of `values`, which they are a function of.

    Args:
        values: floating tensor of any shape. Where one of them changes, all numbers are others (but for one chance in
            2^32, and for values that change places).
        key: what tells apart tensors of equal values, from 0 to 2^32 - 1.

    Returns:
        float32 tensor of the shape of `values`, multiples of 2^-24; the same on every device and in every process.

    Source: the mixing function was found by hash-prospector (C. Wellons): two rounds of multiplication and shift.
    """
    integers = values.detach().reshape(-1).view(_INTEGERS[values.element_size()])
    seed = _mixed(_low_bits(integers.sum(dtype=torch.int64))) ^ _low_bits(torch.tensor(key))
    start = _mixed(seed.clone())
    # A stride of its own for each seed, too: with equal ones one stream of numbers were another, shifted.
    stride = _mixed(start + 1) | 1
    index = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    mixed = _mixed(index.mul_(stride).add_(start))
    return ((mixed >> 8) & 0xFFFFFF).float().mul_(2.0**-24).view(values.shape)


def _low_bits(number: torch.Tensor) -> torch.Tensor:
    """The lowest 32 bits of an int64, as int32."""
    return (((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).int()


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Mix int32 in place, one to one, so that each bit of the result depends on all of `x`; products wrap around."""
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(0x21F0AAAD)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(0x735A2D97)
    return x.bitwise_xor_((x >> 15) & 0x1FFFF)
