"""What bitsandbytes' weights of 4 bits take, also on the meta device, where nothing can be quantized; its import."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

_NESTED = 256  # scales that share one of the second level, as bitsandbytes has it
_KERNELS = "bitsandbytes.backends.cpu.ops"  # the logger that says which faster kernel is not installed
_TABLES = 4 * 16, 4 * (256 + 1)  # bytes of the values of the codes, and of those of nested scales, with their offset


def is_four_bits(module: nn.Module) -> bool:
    """Return whether the weight of a module is one of bitsandbytes in 4 bits, quantized or yet to be."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def bytes_beside(module: nn.Module) -> int:
    """Return what the scales of a weight in 4 bits take, which no parameter or buffer counts.

    Of one on the meta device that is yet to be quantized, it is the difference to the weight it is now: below zero.
    """
    weight = cast(Any, module.weight)
    if weight.quant_state is not None and hasattr(weight.quant_state, "absmax"):
        state, nested = weight.quant_state, weight.quant_state.state2
        held = [state.absmax, state.code]
        if nested is not None:
            held += [nested.absmax, nested.code, state.offset]
        return sum(tensor.nbytes for tensor in held)
    scales = math.ceil(weight.numel() / weight.blocksize)
    beside = 4 * scales + _TABLES[0]
    if weight.compress_statistics:
        beside = scales + 4 * math.ceil(scales / _NESTED) + sum(_TABLES)
    return math.ceil(weight.numel() / 2) + beside - weight.nbytes


@contextmanager
def as_if_quantized(model: nn.Module) -> Iterator[None]:
    """Let weights on the meta device that are yet to be quantized into 4 bits be taken for ones that are."""
    weights = [cast(Any, module.weight) for module in model.modules() if is_four_bits(module)]
    weights = [weight for weight in weights if weight.is_meta and weight.quant_state is None]
    try:
        for weight in weights:
            weight.quant_state = SimpleNamespace(shape=weight.shape)
        yield
    finally:
        for weight in weights:
            weight.quant_state = None


@contextmanager
def kernels_unmentioned() -> Iterator[None]:
    """Let bitsandbytes be imported without a warning that a kernel for products in 4 bits on CPUs is not installed.

    PEFT imports it for every model, so that whoever masks or reads one in floats would be told. All else that
    bitsandbytes has to say is said, and afterwards this as well.
    """
    logger = logging.getLogger(_KERNELS)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
