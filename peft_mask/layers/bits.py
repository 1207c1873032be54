"""Where a layer keeps its packed masks, with room for those that have yet to be loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peft_mask.format.packing import index_dtype, zero_positions
from peft_mask.format.record import read_bits, read_zero_positions
from peft_mask.layers.casting import Integers


class HeldRecord(NamedTuple):
    """The record of a mask, in place of its bits.

    Attributes:
        record: uint8, one dimension, on the CPU (see `format.record`).
        base: returns the weight that the mask is for.
        device: returns where the bits are wanted.
    """

    record: Tensor
    base: Callable[[], Tensor]
    device: Callable[[], torch.device]


class BitsDict(Integers):
    """Packed masks by adapter name, and room for records that are to be loaded by name.

    PEFT loads an adapter through hooks of the tuner. transformers loads it by name: it looks up the buffer that is
    called as the tensor in the file is, compares shapes, and sets the attribute of that name. The file holds records,
    of any length, where layers hold bits, of the weight's shape. So the room for a record has its length, and a record
    that comes is handed to a receiver instead of being kept.

    An adapter that is only used is in here from the start, awaited until it is filled. An adapter with scores is not,
    even while there is room for its record.

    A mask that is computed with by its zeros alone may be kept as its record, a twentieth of the bits or less. Such an
    adapter is in here as any other, with bits that are made whenever somebody asks for them, but it is no buffer: it is
    in no state dict, and stays on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._awaited: dict[str, str] = {}  # adapter name -> name of the module
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the bits of those that are awaited
        self._receivers: dict[str, Callable[[Tensor], None]] = {}
        self._known_zeros: dict[str, tuple[Tensor, int, Tensor]] = {}  # bits, their version, positions
        self._records: dict[str, HeldRecord] = {}

    def wait_for(self, adapter_name: str, module_name: str, shape: Sequence[int]) -> None:
        """Add an adapter that has no mask, of bits of this shape, before `fill`; the module's name is for messages."""
        self[adapter_name] = torch.empty(0, dtype=torch.uint8)
        self._awaited[adapter_name], self._shapes[adapter_name] = module_name, tuple(shape)

    def make_room(self, adapter_name: str, size: int, receive: Callable[[Tensor], None]) -> None:
        """Let an adapter be loaded by name.

        Args:
            adapter_name: which adapter.
            size: length of its record in the file.
            receive: called with the record when it comes. It calls `fill` or `close`, or raises.
        """
        device = self[adapter_name].device if adapter_name in self else torch.device("cpu")
        self[adapter_name] = torch.zeros(size, dtype=torch.uint8, device=device)
        self._receivers[adapter_name] = receive

    def fill(self, adapter_name: str, bits: Tensor) -> None:
        """Give an adapter its mask, on the device where it was awaited; in the same tensor if it has one already."""
        if adapter_name in self._awaited:
            self._forget(adapter_name)
            self[adapter_name] = bits.to(self[adapter_name].device)
        else:
            self[adapter_name].copy_(bits)

    def hold_record(self, adapter_name: str, held: HeldRecord) -> None:
        """Add an adapter as the record of its mask, which was checked; one that is held already gets this mask."""
        self._known_zeros.pop(adapter_name, None)
        self._records[adapter_name] = held

    def hold_bits(self, adapter_name: str, bits: Tensor) -> None:
        """Add an adapter as its bits, which move with the model but are in no state dict."""
        self._known_zeros.pop(adapter_name, None)
        self.register_buffer(adapter_name, bits, persistent=False)

    def holds_record(self, adapter_name: str) -> bool:
        """Return whether an adapter is kept as the record of its mask."""
        return adapter_name in self._records

    def kept(self, adapter_name: str) -> Tensor:
        """Return what is kept of an adapter, bits or record: as long as it is this tensor, the mask is the same."""
        held = self._records.get(adapter_name)
        return self[adapter_name] if held is None else held.record

    def zero_positions(self, adapter_name: str, shape: Sequence[int], *, keep: bool = True) -> Tensor:
        """Return where an adapter's mask of this shape is off: row-major positions, int32 wherever these reach.

        Finding them takes longer than the switch they are for, so they are kept: 4 bytes a weight that is off. They are
        found anew when the bits are another tensor or were written to since.

        Args:
            adapter_name: which adapter.
            shape: of the mask.
            keep: whether to keep what was found.
        """
        bits = self.kept(adapter_name)
        known = self._known_zeros.get(adapter_name)
        if known is not None and known[0] is bits and known[1] == bits._version:
            return known[2]
        if (held := self._records.get(adapter_name)) is not None:
            positions = read_zero_positions(held.record, held.base).to(held.device())
        else:
            positions = zero_positions(bits, shape)
        positions = positions.to(index_dtype(math.prod(shape)))
        if keep and not bits.is_inference():  # such tensors have no version
            self._known_zeros[adapter_name] = (bits, bits._version, positions)
        return positions

    def close(self, adapter_name: str) -> None:
        """Remove the room for the record of an adapter with scores, if there is any."""
        if adapter_name in self._receivers:
            del self[adapter_name]

    def is_open(self, adapter_name: str) -> bool:
        """Return whether there is a mask to come for an adapter, or room for its record."""
        return adapter_name in self._awaited or adapter_name in self._receivers

    def check_filled(self, adapter_name: str) -> None:
        """Raise a `ValueError` if the mask of an adapter was never loaded."""
        if reason := self.reason_not_filled([adapter_name]):
            raise ValueError(reason)

    def reason_not_filled(self, adapter_names: Iterable[str]) -> str | None:
        """Return what to say of the first of these adapters whose mask was never loaded, or None."""
        name = next((name for name in adapter_names if name in self._awaited), None)
        if name is None:
            return None
        return (
            f"the adapter '{name}' has no mask for '{self._awaited[name]}': nothing was loaded for it, or loading "
            "failed. Delete the adapter and load it again, from a file that is whole."
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # bits that a whole state dict brings need no record: they are the mask of a model like this one
        for name in list(self._awaited):
            bits = state_dict.get(prefix + name)
            if bits is not None and bits.dtype == torch.uint8 and tuple(bits.shape) == self._shapes[name]:
                self.fill(name, torch.empty_like(bits, device=self[name].device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _forget(self, adapter_name: str) -> None:
        self._shapes.pop(adapter_name, None)
        self._awaited.pop(adapter_name, None)
        self._receivers.pop(adapter_name, None)

    def keys(self) -> Any:
        """Return the names of all adapters that have bits, or room for a record."""
        return {**self._buffers, **self._records}.keys() if self._records else super().keys()

    def __getitem__(self, adapter_name: str) -> Tensor:
        if (held := self._records.get(adapter_name)) is None:
            return cast(Tensor, super().__getitem__(adapter_name))
        return read_bits(held.record, held.base).to(held.device())

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._records or (
            super().__contains__(adapter_name)
            and (adapter_name in self._awaited or adapter_name not in self._receivers)
        )

    def __delitem__(self, adapter_name: str) -> None:
        self._forget(adapter_name)
        self._known_zeros.pop(adapter_name, None)
        if self._records.pop(adapter_name, None) is None:
            super().__delitem__(adapter_name)

    def __getattr__(self, name: str) -> Any:
        # only who loads by name asks for an attribute, and would now find that the shapes differ
        if name in self.__dict__.get("_awaited", {}) and name not in self._receivers:
            raise AttributeError(
                f"cannot load the mask of '{self._awaited[name]}' by name: the adapter's configuration does not say "
                "how long its record is (record_bytes in adapter_config.json), or says it of other modules than are "
                "masked here. Load it with PeftModel.from_pretrained; if that works, save it again."
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        receive = self.__dict__.get("_receivers", {}).get(name)
        if receive is None:
            super().__setattr__(name, value)
        else:
            receive(value)


def check_not_traced() -> None:
    """Raise a `RuntimeError` under `torch.jit.trace`, which cannot record bits that are read as another dtype."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record how a mask is made: merge it first, with merge_and_unload() or "
            "merge_adapter(). torch.export and torch.compile take the model as it is."
        )
