"""Whether a layer with a forward of its own computes what the class that it derives from does."""

from __future__ import annotations

import copy
import inspect

import torch
import torch.nn.functional as F
from torch import nn

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # and no eight bits, which have a scale


def computes_as_linear(module: nn.Linear) -> bool:
    """Return whether the `forward` of a subclass of `nn.Linear` is `x W^T + b` in its own words, such as Falcon's.

    It is tried: a copy of the module with a small weight and bias computes a few inputs, in training and in
    evaluation, in float32 and bfloat16, and must come to what `F.linear` does, in shape, dtype and value. A router that
    also chooses, a layer that scales, clamps or computes in a dtype of its own, or takes more than its input, does not.

    Args:
        module: the layer, on any device; it is not changed.
    """
    if module.weight.dtype not in _PLAIN or len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            return all(
                _agrees(module, dtype, training)
                for dtype in (torch.float32, torch.bfloat16)
                for training in (True, False)
            )
    except Exception:  # whatever it needs to compute, it is not a linear layer's
        return False


@torch.no_grad()
def _agrees(module: nn.Linear, dtype: torch.dtype, training: bool) -> bool:
    weight, few, many = (_numbers(*shape, dtype=dtype) for shape in ((5, 3), (4, 3), (2, 4, 3)))
    bias = None if module.bias is None else _numbers(5, dtype=dtype)
    trial = copy.copy(module)
    trial.in_features, trial.out_features, trial.training = 3, 5, training
    trial._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    trial._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    for x in (few, many, 1000 * many):
        y, expected = type(module).forward(trial, x), F.linear(x, weight, bias)
        if type(y) is not torch.Tensor or y.dtype != expected.dtype or y.shape != expected.shape:
            return False
        tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        if not torch.allclose(y, expected, rtol=0, atol=tolerance):
            return False
    return True


def _numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in [-1, 1] that look random, without a draw from anyone's generator."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64, device="cpu").mul(12.9898).sin().view(shape).to(dtype)
