"""Tensors of which each process holds a part: what FSDP and DeepSpeed do to them, and how they become whole again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, as FSDP2 makes of parameters."""
    return hasattr(tensor, "full_tensor")  # without importing torch.distributed


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, which it keeps where DeepSpeed ZeRO-3 has taken its values away."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def is_taken_away(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 keeps a parameter in parts, as it does outside the forward pass of the module."""
    return parameter.shape != shape_of(parameter)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it would be in one process; if it is in parts, all processes must call this together."""
    if is_taken_away(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, to be changed in place: all of it, or its shard."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def local_part(tensor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return the part of a whole tensor, the same in all processes, that lies where the shard of another one does."""
    if not is_sharded(of):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, of).device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=cast(Any, of).placements).to_local()  # each takes its own, none sends


def absolute_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of absolute values, over all shards: float32 or float64; not finite if one value is not.

    The largest of them would say that as well, but not of a process whose shard is empty.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return whole(torch.linalg.vector_norm(tensor, ord=1, dtype=dtype))


def absolute_sums(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return `absolute_sum` of each tensor, of all that lie on one device in one operation."""
    sums: dict[int, torch.Tensor] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor) or is_taken_away(tensor) or tensor.is_sparse:
            sums[index] = absolute_sum(tensor)
        else:
            alike[tensor.device, tensor.dtype].append(index)
    for (_, dtype), indices in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        sums |= zip(indices, torch._foreach_norm([tensors[i] for i in indices], 1, dtype=wide), strict=True)
    return [sums[index] for index in range(len(tensors))]


def sum_over_processes(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return numbers of this process plus those of all others, which must call this together."""
    total = torch.stack(values)
    torch.distributed.all_reduce(total)
    return list(total.unbind())


def is_flattened(parameter: torch.Tensor) -> bool:
    """Return whether FSDP1 keeps a parameter as part of a flat one, so that its shape is that of some piece."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_in_parts(parameter: torch.Tensor) -> bool:
    """Return whether FSDP or DeepSpeed keeps a parameter, or what it trains in its place, in its own way."""
    zero = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
    return zero or is_sharded(parameter) or is_flattened(parameter)


def is_whole(parameter: torch.Tensor) -> bool:
    """Return whether all values of a parameter are here now: it is neither on the meta device nor in parts."""
    in_parts = is_sharded(parameter) or is_taken_away(parameter) or (is_flattened(parameter) and parameter.dim() == 1)
    return not parameter.is_meta and not in_parts


def has_no_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values are freed, as FSDP1 does with views of a flat parameter between two uses."""
    return tensor.device.type != "meta" and tensor.numel() > 0 and tensor.untyped_storage().size() == 0


def check_can_change(parameter: torch.Tensor, what: str) -> None:
    """Raise a `RuntimeError` if DeepSpeed trains a parameter: it does that in a copy of its own, in its own time."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        raise RuntimeError(
            f"{what} would have no effect: DeepSpeed takes its step within the backward pass, in copies of the "
            "parameters, and overwrites what is changed in between. Do it before the model is prepared, or train under "
            "DDP."
        )
