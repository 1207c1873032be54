"""What a layer remembers of the weights that its masks switch off, for as long as it is true."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from peft_mask.layers.correction import Zeros

_Stamp = tuple[Any, ...]


class KnownZeros:
    """The zeros of each adapter with their values, gathered once.

    They are dropped when the weight may have changed: on merging, unmerging, casts and moves by the layer, and else
    when the parameter or the bits are another tensor, at another place, or were written to as autograd counts it. What
    is written through `.data`, past the layer, is seen by nobody.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[_Stamp, Zeros]] = {}

    def get(self, adapter_name: str, parameter: Tensor, bits: Tensor, dtype: torch.dtype) -> Zeros | None:
        """Return what is known of an adapter's zeros, if it is of these tensors as they are, in this dtype."""
        kept = self._kept.get(adapter_name)
        return kept[1] if kept is not None and _fits(kept[0], _stamp(parameter, bits, dtype)) else None

    def put(self, adapter_name: str, parameter: Tensor, bits: Tensor, zeros: Zeros) -> None:
        """Remember an adapter's zeros; not where nobody would learn of changes."""
        if not bits.is_inference():
            self._kept[adapter_name] = (_stamp(parameter, bits, zeros.values.dtype), zeros)

    def drop(self, adapter_name: str | None = None) -> None:
        """Forget the zeros of an adapter, or of all."""
        if adapter_name is None:
            self._kept.clear()
        else:
            self._kept.pop(adapter_name, None)

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: Any) -> KnownZeros:
        return KnownZeros()  # they are of other tensors there

    def __reduce__(self) -> Any:
        return KnownZeros, ()


def _stamp(parameter: Tensor, bits: Tensor, dtype: torch.dtype) -> _Stamp:
    versions = [0 if tensor.is_inference() else tensor._version for tensor in (parameter, bits)]
    return weakref.ref(parameter), weakref.ref(bits), parameter.data_ptr(), bits.data_ptr(), *versions, dtype


def _fits(kept: _Stamp, now: _Stamp) -> bool:
    return kept[0]() is now[0]() and kept[1]() is now[1]() and kept[2:] == now[2:]
