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


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, to be changed in place: all of it, or its shard."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def local_part(tensor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return the part of a whole tensor that lies where this process's shard of another one does; all call together."""
    if not is_sharded(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    other = cast(Any, of)
    return distribute_tensor(tensor, other.device_mesh, other.placements).to_local()


def absolute_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of absolute values, over all shards: float32 or float64; not finite if one value is not.

    The largest of them would say that as well, but not of a process whose shard is empty.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return whole(torch.linalg.vector_norm(tensor, ord=1, dtype=dtype))


def is_flattened(parameter: torch.Tensor) -> bool:
    """Return whether FSDP1 keeps a parameter as part of a flat one, so that its shape is that of some piece."""
    return getattr(parameter, "_fsdp_flattened", False)
