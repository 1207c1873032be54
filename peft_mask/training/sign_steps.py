"""Sign steps of many tensors at once: `p = p - size * sign(gradient)`."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_A_TIME = 2**24  # elements of temporary tensors, of 4 bytes each
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32


@dataclass(frozen=True)
class SignStep:
    """A step of one parameter.

    Attributes:
        parameter: what moves, any floating dtype; of a sharded one, this process's part.
        grad: its gradient, of the same shape and device.
        size: how far: a number or, not to be read, float32 or float64 without dimensions on the device.
        draw: what tells its random numbers from those of other steps and parameters; used for 16 bits.
    """

    parameter: Tensor
    grad: Tensor
    size: float | Tensor
    draw: str


@torch.no_grad()
def take(steps: Sequence[SignStep]) -> None:
    """Take these steps, in as few operations as the sizes of their tensors allow. The sign of NaN is 0."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
    for step in steps:
        if step.parameter.dtype in _DROPPED_BITS:
            _take_rounding(step)
        elif isinstance(step.size, Tensor):
            step.parameter.sub_(step.grad.sign().mul_(step.size))
        else:
            alike[step.parameter.device, step.parameter.dtype].append((step.parameter, step.grad, step.size))
    for members in alike.values():
        for portion in _portions(members):
            parameters, grads, sizes = zip(*portion, strict=True)
            signs = torch._foreach_sign(grads)
            torch._foreach_mul_(signs, sizes)
            torch._foreach_sub_(parameters, signs)


def _portions(members: Sequence[tuple[Tensor, Tensor, float]]) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Yield them in turn, in lists that have no more elements together than may be taken at a time."""
    portion: list[tuple[Tensor, Tensor, float]] = []
    elements = 0
    for member in members:
        if portion and elements + member[0].numel() > _AT_A_TIME:
            yield portion
            portion, elements = [], 0
        portion.append(member)
        elements += member[0].numel()
    if portion:
        yield portion


def _take_rounding(step: SignStep) -> None:
    """Take the step of a parameter of 16 bits, in parts: several float32 and integers a number are needed."""
    # hashed, because torch's CPU generator looks at the lowest 32 bits of its seed only
    generator = torch.Generator(step.parameter.device).manual_seed(zlib.crc32(step.draw.encode()))
    grads = step.grad.reshape(-1).split(_AT_A_TIME // 4)
    for part, grad in zip(step.parameter.view(-1).split(_AT_A_TIME // 4), grads, strict=True):
        exact = part.float().sub_(grad.float().sign_().mul_(step.size))
        part.copy_(round_stochastically(exact, part.dtype, generator))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 values to one of their two neighbors in a 16-bit dtype, so that the expectation is exact.

    Args:
        values: float32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        generator: of the device of `values`.

    Returns:
        Tensor of `dtype`. What it can represent is returned as it is; so are infinities and NaN.
    """
    dropped = _DROPPED_BITS[dtype]
    noise = torch.randint(1 << dropped, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    # adding noise below the bits that are kept carries into them with the probability of the part that is dropped
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-1 << dropped)
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
