"""What DistributedDataParallel need not send: positions and packed masks, which are the same in all processes.

DDP sends all buffers from the first process to the others before each forward pass in training, as batch norm wants
it. Of a masked model these would be 0.4 bytes a weight each time, which never change in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

_NAMES = (".peft_mask_positions.", ".peft_mask_bits.")
_PREFIXES = ("", "model.", "base_model.model.")  # of DDP around the base model, `MaskModel` and `PeftModel`
_ODD = -0x61C8864680B583EB  # the golden ratio's, of 64 bits


_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks


class SameEverywhere:
    """The names of a model's positions and packed masks, if they are the same in all processes; else no names.

    DDP asks for the names when it is made, in all processes at once, and from then on never equalizes what is named. So
    processes compare it here: candidates that each has drawn or chosen for itself stay DDP's to send.

    Args:
        model: the base model with masked layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[str]:
        own = {name: buffer for name, buffer in self._model.named_buffers() if any(each in name for each in _NAMES)}
        if not _is_same_everywhere(self._model, list(own.values())):
            return iter(())
        return iter([prefix + name for name in own for prefix in _PREFIXES])


def spare_replicas(model: nn.Module) -> None:
    """Let DDP around a base model, or around what PEFT makes of it, send none of the adapters' buffers without need."""
    if not hasattr(model, _IGNORED):  # else its owner has said what to leave alone
        setattr(model, _IGNORED, SameEverywhere(model))


def spare_no_more(model: nn.Module) -> None:
    """Leave nothing of `spare_replicas` on a model that has no adapters any more."""
    if isinstance(model.__dict__.get(_IGNORED), SameEverywhere):
        delattr(model, _IGNORED)


def _is_same_everywhere(model: nn.Module, tensors: list[torch.Tensor]) -> bool:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return True
    device = next(model.parameters()).device
    own = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        own = own * _ODD + _digest(tensor).to(device)
    all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, own)
    return len(torch.stack(all_of_them).unique()) == 1


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number that says which integers a tensor holds, in which order: int64, no dimensions."""
    values = tensor.reshape(-1).long()
    places = torch.arange(len(values), device=tensor.device)
    mixed = (values + 1) * (2 * places + 1) * _ODD  # wraps around
    return (mixed ^ (mixed >> 32)).sum() + len(values)
