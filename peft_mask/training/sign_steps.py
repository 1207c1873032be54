"""Sign steps of many tensors at once: `p = p - size * sign(gradient)`."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_A_TIME = 2**24  # bytes of each temporary tensor
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32


@dataclass(frozen=True)
class SignStep:
    """A step of one parameter.

    Attributes:
        parameter: what moves, any floating dtype, without gaps in memory; of a sharded one, this process's part.
        grad: its gradient, of the same shape and device.
        size: how far: a number or, not to be read, float32 or float64 without dimensions on the device.
        draw: what tells its random numbers from those of other steps and parameters; used for 16 bits.
    """

    parameter: Tensor
    grad: Tensor
    size: float | Tensor
    draw: str


@dataclass(frozen=True)
class _Part:
    """A piece of a step, small enough to be taken at a time; `generator` draws for the pieces of one in turn."""

    parameter: Tensor
    grad: Tensor
    size: float | Tensor
    generator: torch.Generator | None


@torch.no_grad()
def take(steps: Sequence[SignStep]) -> None:
    """Take these steps, in as few operations as their sizes allow. The sign of NaN is 0."""
    alike: dict[tuple[torch.device, torch.dtype], list[SignStep]] = defaultdict(list)
    for step in steps:
        alike[step.parameter.device, step.parameter.dtype].append(step)
    for (_, dtype), members in alike.items():
        for parts in _portions(members):
            _take_rounding(parts, dtype) if dtype in _DROPPED_BITS else _take_exactly(parts)


def _portions(steps: Sequence[SignStep]) -> Iterator[list[_Part]]:
    """Yield the pieces of all steps in turn, in lists of as many as may be taken at a time."""
    portion: list[_Part] = []
    most = _AT_A_TIME // 4
    for step in steps:
        generator = None
        if step.parameter.dtype in _DROPPED_BITS:
            # hashed, because torch's CPU generator looks at the lowest 32 bits of its seed only
            generator = torch.Generator(step.parameter.device).manual_seed(zlib.crc32(step.draw.encode()))
        # as they lie in memory, which `channels_last` may have put in another order
        order = sorted(range(step.parameter.dim()), key=step.parameter.stride, reverse=True)
        pieces = step.parameter.permute(order).view(-1).split(most), step.grad.permute(order).reshape(-1).split(most)
        for parameter, grad in zip(*pieces, strict=True):
            if portion and sum(len(part.grad) for part in portion) + len(grad) > most:
                yield portion
                portion = []
            portion.append(_Part(parameter, grad, step.size, generator))
    if portion:
        yield portion


def _take_exactly(parts: Sequence[_Part]) -> None:
    signs = torch._foreach_sign([part.grad for part in parts])
    _scale(signs, parts)
    torch._foreach_sub_([part.parameter for part in parts], signs)


def _take_rounding(parts: Sequence[_Part], dtype: torch.dtype) -> None:
    sizes = [len(part.grad) for part in parts]
    steps = torch.cat([part.grad for part in parts]).float().sign_()
    _scale(steps.split(sizes), parts)
    exact = torch.cat([part.parameter for part in parts]).float().sub_(steps)
    del steps
    noise = torch.cat([rounding_noise(part.parameter, dtype, part.generator) for part in parts])
    rounded = round_stochastically(exact, dtype, noise)
    torch._foreach_copy_([part.parameter for part in parts], rounded.split(sizes))


def _scale(signs: Sequence[Tensor], parts: Sequence[_Part]) -> None:
    numbers = [part.size for part in parts if not isinstance(part.size, Tensor)]
    if len(numbers) == len(parts):
        torch._foreach_mul_(list(signs), numbers)
        return
    for sign, part in zip(signs, parts, strict=True):
        sign.mul_(part.size)


def rounding_noise(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return random numbers for `round_stochastically`: int32, of the shape and on the device of `values`."""
    size = 1 << _DROPPED_BITS[dtype]
    return torch.randint(size, values.shape, generator=generator, device=values.device, dtype=torch.int32)


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 values to one of their two neighbors in a 16-bit dtype, so that the expectation is exact.

    Args:
        values: float32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        noise: of `rounding_noise`; it is overwritten.

    Returns:
        Tensor of `dtype`. What it can represent is returned as it is; so are infinities and NaN.
    """
    # adding noise below the bits that are kept carries into them with the probability of the part that is dropped
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-1 << _DROPPED_BITS[dtype])
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(dtype)
