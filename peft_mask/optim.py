"""Optimizers: sign steps for scores beside AdamW for everything else."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch


class SignAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `sign=True` take sign steps instead: `p = p - lr * sign(gradient)`.

    A score that moves by one step a batch counts for how many batches its weight should go, less for how many it should
    stay. Where only the order of the scores matters (`binarizer="topk"`), nothing else is to be set; and sign steps
    need no state, where Adam keeps two numbers a score.

    Scores of 16 bits are rounded stochastically: a step far below their precision is taken with the probability that
    makes it right on average. The random numbers depend on the number of the step alone, so that they are the same on
    every process and after a resume.

    Args:
        params: parameters or groups, as for AdamW; groups may hold `"sign": True`.
        **kwargs: as for AdamW.

    Source: the sign steps are signSGD (Bernstein et al. 2018); the official code of Zhao et al. 2020 offers it, too.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = self.param_groups
        for group in everything:
            if group.get("sign"):
                _sign_steps(group)
        self.param_groups = [group for group in everything if not group.get("sign")]
        try:
            super().step()
        finally:
            self.param_groups = everything
        return loss


@torch.no_grad()
def _sign_steps(group: dict[str, Any]) -> None:
    group["sign_steps"] = step = group.get("sign_steps", 0) + 1
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is None:
            continue
        if parameter.dtype in (torch.bfloat16, torch.float16):
            # hashed, because torch's CPU generator looks at the lowest 32 bits of its seed only
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{step}/{index}".encode()))
            exact = parameter.float().sub_(parameter.grad.float().sign_(), alpha=group["lr"])
            parameter.copy_(round_stochastically(exact, parameter.dtype, generator))
        else:
            parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def round_stochastically(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Round float32 values to one of their two neighbors in a 16-bit dtype, so that the expectation is exact.

    Args:
        values: float32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        generator: of the device of `values`.

    Returns:
        Tensor of `dtype`. What it can represent is returned as it is; so are infinities and NaN.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    noise = torch.randint(1 << dropped, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = values.contiguous().view(torch.int32) + noise
    # adding noise below the bits that are kept carries into them with the probability of the part that is dropped
    rounded = (bits >> dropped << dropped).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
