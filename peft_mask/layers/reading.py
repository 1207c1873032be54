"""A weight that can be asked what it is like, and not be computed with, where there is no weight to give."""

from __future__ import annotations

from typing import Any

import torch


class NoWeight(torch.Tensor):
    """What stands for a weight that is not there: of its shape, dtype and device, and without values.

    Models ask weights for their dtype, as T5 does, and may do so when none could be computed with.

    Args:
        like: tensor whose shape, dtype and device it has.
        reason: what a `ValueError` says to whoever computes with it.
    """

    reason: str

    @staticmethod
    def __new__(cls, like: torch.Tensor, reason: str) -> NoWeight:
        made: NoWeight = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made.reason = reason
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        raise ValueError(next(tensor.reason for tensor in tensors if isinstance(tensor, cls)))
