"""What a layer remembers of the weights that its masks switch off, for as long as it is true."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_mask.layers.correction import Zeros


class KnownZeros:
    """The zeros of each adapter with their values, gathered once.

    They are dropped when the weight may have changed: on merging, unmerging, casts and moves by the layer, and else
    when the parameter or the bits are another tensor, at another place, or were written to as autograd counts it. What
    is written through `.data`, past the layer, is seen by nobody.
    """

    def __init__(self) -> None:
        self._weight: tuple[Any, ...] = ()  # parameter, where and as it was
        self._kept: dict[str, tuple[weakref.ref[Tensor], int, Zeros]] = {}  # bits, their version

    def of(
        self,
        bits: Mapping[str, Tensor],
        parameter: Tensor,
        dtype: torch.dtype,
        gather: Callable[[str], Zeros],
    ) -> list[Zeros]:
        """Return the zeros of some adapters, gathered where they are not known.

        Args:
            bits: adapter name -> its packed mask.
            parameter: what holds the weight.
            dtype: of the values.
            gather: makes an adapter's zeros.
        """
        now = (_place(parameter), 0 if parameter.is_inference() else parameter._version, dtype)
        if not self._weight or self._weight[0]() is not parameter or self._weight[1:] != now:
            self._kept = {}  # another one, so that a thread that fills the old one does no harm
            self._weight = (weakref.ref(parameter), *now)
        kept, found = self._kept, []
        for name, own in bits.items():
            known = kept.get(name)
            if known is None or known[0]() is not own or known[1] != own._version:
                zeros = gather(name)
                if not own.is_inference():  # else nobody would learn of changes
                    kept[name] = (weakref.ref(own), own._version, zeros)
            else:
                zeros = known[2]
            found.append(zeros)
        return found

    def drop(self, adapter_name: str | None = None) -> None:
        """Forget the zeros of an adapter, or of all."""
        if adapter_name is None:
            self._kept, self._weight = {}, ()
        else:
            self._kept.pop(adapter_name, None)

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: Any) -> KnownZeros:
        return KnownZeros()  # they are of other tensors there

    def __reduce__(self) -> Any:
        return KnownZeros, ()


def _place(parameter: Tensor) -> int:
    """Return where a parameter lies in memory; those that are made of other tensors have no place of their own."""
    try:
        return parameter.data_ptr()
    except RuntimeError:
        return 0
