"""What a layer remembers of the weights that its masks switch off, for as long as it is true."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_mask.layers.correction import Zeros

_Kept = dict[str, tuple[weakref.ref[Tensor], int, Zeros]]  # by adapter: its bits, their version


class KnownZeros:
    """The zeros of each adapter with their values, gathered once.

    They are dropped when the weight may have changed: on merging, casts and moves by the layer, when the layer is set
    to train, and else when the parameter or the bits are another tensor, at another place, or were written to as
    autograd counts it. It counts neither for tensors of inference mode nor what optimizers with `fused=True` write: of
    the former, and of weights that ask for gradients, nothing is kept. What is written through `.data`, past the layer,
    is seen by nobody.
    """

    def __init__(self) -> None:
        # parameter, where and as it was, with what is known of it: one value, which threads exchange at once
        self._known: tuple[weakref.ref[Tensor] | None, tuple[Any, ...], _Kept] = (None, (), {})

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
        if parameter.is_inference() or parameter.requires_grad:  # nobody would learn of all changes
            self.drop()
            return [gather(name) for name in bits]
        now = (_place(parameter), parameter._version, dtype)
        of, was, kept = self._known
        if of is None or of() is not parameter or was != now:
            kept = {}  # another one, so that a thread that fills the old one does no harm
            self._known = (weakref.ref(parameter), now, kept)
        found = []
        for name, own in bits.items():
            known = kept.get(name)
            if known is None or known[0]() is not own or known[1] != own._version:
                with torch.inference_mode(False), torch.no_grad():  # they may be used for gradients later
                    zeros = gather(name)
                if not own.is_inference():
                    kept[name] = (weakref.ref(own), own._version, zeros)
            else:
                zeros = known[2]
            found.append(zeros)
        return found

    def held(self, adapter_name: str) -> Zeros | None:
        """Return what is remembered of an adapter, or None."""
        known = self._known[2].get(adapter_name)
        return None if known is None else known[2]

    def drop(self, adapter_name: str | None = None) -> None:
        """Forget the zeros of an adapter, or of all."""
        if adapter_name is None:
            self._known = (None, (), {})
        else:
            self._known[2].pop(adapter_name, None)

    def __len__(self) -> int:
        return len(self._known[2])

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
