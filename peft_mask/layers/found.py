"""Where the masks of a layer are off: found once a forward pass, and not again when that is computed once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Found:
    """The positions that were off in the latest forward pass, by adapter.

    They serve the backward pass, and the forward pass that gradient checkpointing runs again within it. They are never
    kept from one forward pass to the next: optimizers can write scores without a trace that could be looked for, as
    bitsandbytes' kernels and writes to `.data` do.
    """

    def __init__(self) -> None:
        self._off: dict[str, torch.Tensor] = {}
        self._ahead: set[str] = set()  # of those that were found for the forward pass that is running

    def __getstate__(self) -> dict[str, Any]:
        return {"_off": {}, "_ahead": set()}  # nothing of it belongs into a copy or a file

    def off(self, adapter_name: str, device: torch.device, find: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return where the mask of an adapter is off, on a device: what is known if it holds, else what `find` does."""
        if torch.compiler.is_compiling():  # a graph has both passes, and shares what it has found
            return find()
        known = self._off.get(adapter_name)
        if known is not None and known.device == device and (adapter_name in self._ahead or _runs_backward()):
            # autograd refuses what an evaluation under `inference_mode` has found in between
            return find() if known.is_inference() and not torch.is_inference_mode_enabled() else known
        found = self._off[adapter_name] = find()
        return found

    def ahead(self, adapter_name: str, off: torch.Tensor) -> None:
        """Take what was found for a forward pass that begins, until `forget_ahead`."""
        self._off[adapter_name] = off
        self._ahead.add(adapter_name)

    def end_ahead(self) -> None:
        """End what `ahead` has begun, with its forward pass."""
        self._ahead.clear()

    def forget(self) -> None:
        """Forget everything, as scores or weights have moved."""
        self._off.clear()
        self._ahead.clear()


def _runs_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread, so that a forward pass is one that it repeats."""
    return torch._C._current_graph_task_id() != -1
