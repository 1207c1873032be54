"""Tensors of which each process holds a part: what FSDP2 can put together again, and what others have flattened."""

from __future__ import annotations

from typing import Any, cast

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, as FSDP2 makes of parameters."""
    return hasattr(tensor, "full_tensor")  # without importing torch.distributed


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it would be in one process; if it is sharded, all processes must call this together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def is_flattened(parameter: torch.Tensor) -> bool:
    """Return whether FSDP1 keeps a parameter as part of a flat one, so that its shape is that of some piece."""
    return getattr(parameter, "_fsdp_flattened", False)
