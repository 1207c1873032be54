"""What fits a card: how much of it tensors may take, and the longest row of tokens that a step has room for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SHORTEST = 256  # tokens: the step in which rows get longer


def usable(card: float) -> float:
    """Return the bytes of a card that tensors may take.

    Without 1 GiB for CUDA's context and libraries, and 5 % for what is lost between blocks of memory.

    Args:
        card: its memory in GiB.
    """
    return 0.95 * card * 2**30 - 2**30


def longest(room: float, needs: Callable[[int], int], most: int) -> int:
    """Return the longest row that fits, in steps of `SHORTEST`, and 0 if none does.

    Args:
        room: bytes.
        needs: bytes that a step takes on a row of so many tokens; each token takes as much as any other.
        most: tokens of the longest row that the model is made for.

    Raises:
        ValueError: tokens of long rows take more than those of short ones.
    """
    if most <= SHORTEST:
        return most if needs(most) <= room else 0
    a_token = (needs(most) - needs(SHORTEST)) / (most - SHORTEST)
    between = (most - SHORTEST) // 8
    if abs(needs(SHORTEST + between) - needs(SHORTEST) - a_token * between) >= 2**20:
        raise ValueError("the memory of a row does not grow in step with its tokens: estimate one length at a time.")
    tokens = SHORTEST + (room - needs(SHORTEST)) / a_token
    return int(min(max(tokens, 0), most)) // SHORTEST * SHORTEST


def quantize_shapes(backbone: nn.Module) -> None:
    """Put layers of bitsandbytes in NF4 in the place of a backbone's linear layers, in place; none of them has weights.

    Args:
        backbone: what is quantized, on the meta device; transformers leaves the output head out.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    for parent in [*backbone.modules()]:
        for name, module in [*parent.named_children()]:
            if isinstance(module, nn.Linear):
                size = module.in_features, module.out_features
                bias = module.bias is not None
                layer = Linear4bit(*size, bias, torch.bfloat16, quant_type="nf4", device="meta")
                setattr(parent, name, layer)
