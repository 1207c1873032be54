"""Where a layer keeps its packed masks, with room for those that have yet to be loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor


class BitsDict(BufferDict):
    """Packed masks by adapter name; of an adapter that is not loaded yet, room for what will come from the file.

    PEFT loads an adapter through hooks of the tuner and calls `fill`. transformers loads it by name: it looks up the
    buffer that is called as the tensor in the file is, compares shapes, and sets the attribute of that name. The file
    holds records, of any length, where layers hold bits, of the weight's shape. So room is as long as the record in the
    file, if that is known, and what it is set to goes to a receiver, which decodes it and calls `fill`.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self._awaited: dict[str, str] = {}  # adapter name -> what a message calls its mask
        self._receivers: dict[str, Callable[[Tensor], None]] = {}

    def wait_for(self, adapter_name: str, module_name: str) -> None:
        """Add an adapter without a mask: only `fill` or a receiver gives it one."""
        self[adapter_name] = torch.empty(0, dtype=torch.uint8)
        self._awaited[adapter_name] = module_name

    def make_room(self, adapter_name: str, size: int, receive: Callable[[Tensor], None]) -> None:
        """Let an awaited adapter be loaded by name.

        Args:
            adapter_name: which adapter.
            size: length of its record in the file.
            receive: called with the record when it comes; calls `fill`, or raises if the record is not accepted.
        """
        self[adapter_name] = torch.zeros(size, dtype=torch.uint8, device=self[adapter_name].device)
        self._receivers[adapter_name] = receive

    def fill(self, adapter_name: str, bits: Tensor) -> None:
        """Give an adapter its mask, on the device where it was awaited."""
        self._forget(adapter_name)
        self[adapter_name] = bits.to(self[adapter_name].device)

    def check_filled(self, adapter_name: str) -> None:
        """Raise a `ValueError` if the mask of an adapter was never loaded."""
        if adapter_name in self._awaited:
            raise ValueError(
                f"the adapter '{adapter_name}' has no mask for '{self._awaited[adapter_name]}': nothing was loaded for "
                "it, or loading failed. Delete the adapter and load it again, from a file that is whole."
            )

    def _forget(self, adapter_name: str) -> None:
        self._awaited.pop(adapter_name, None)
        self._receivers.pop(adapter_name, None)

    def __delitem__(self, adapter_name: str) -> None:
        self._forget(adapter_name)
        super().__delitem__(adapter_name)

    def __getattr__(self, name: str) -> Any:
        # asked for as an attribute only by who loads by name, and about to find that the shapes differ
        if name in self.__dict__.get("_awaited", {}) and name not in self._receivers:
            raise AttributeError(
                f"cannot load the mask of '{self._awaited[name]}' by name: the adapter's configuration does not say how "
                "long its record is (record_bytes in adapter_config.json), or says it of other modules than are "
                "masked here. Load it with PeftModel.from_pretrained; if that works, save it again."
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        receive = self.__dict__.get("_receivers", {}).get(name)
        if receive is None:
            super().__setattr__(name, value)
        else:
            receive(value)
