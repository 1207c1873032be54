"""The weight of a base layer, however it is stored: its values, and how some of them are switched off and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from peft_mask.tensors.elements import put, take
from peft_mask.tensors.sharded import has_no_storage, is_flattened, is_sharded, is_taken_away, shape_of

COMPUTED_ANEW = (
    "its {name} is computed anew in each forward pass (weight_norm, spectral_norm, prune or another parametrization), "
    "and a mask merged into it would be lost. Make it a parameter again first, with remove_parametrizations of "
    "torch.nn.utils.parametrize, or remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
)

Displaced = tuple[torch.Tensor, torch.Tensor]  # row-major positions, and the elements that are stored there otherwise


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is stored as it is, as a parameter of a floating dtype; other ways to store one are subclasses.

    What is stored for one weight is called an element. Switching a weight off stores another element in its place.

    Attributes:
        module: the layer that owns it.
        name: the parameter's name there.
    """

    module: nn.Module
    name: str = "weight"

    exact: ClassVar[bool | None] = None  # False: with quantization error; None: as the dtype says

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that holds the elements."""
        return cast(torch.Tensor, getattr(self.module, self.name))

    @property
    def reason_not_kept(self) -> str | None:
        """Why what is stored here does not stay, or None if it does."""
        if self.name in self.module._parameters or is_flattened(self.parameter) or has_no_storage(self.parameter):
            return None  # of FSDP1 there are views of a flat parameter, which `targets` refuses in its own words
        return COMPUTED_ANEW.format(name=self.name)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, and so of its masks."""
        if is_flattened(self.parameter) and self.parameter.dim() == 1:
            raise RuntimeError(
                f"FSDP1 keeps the {self.name} of a {type(self.module).__name__} as a piece of a flat parameter, of "
                "which no mask can be made, merged or saved. Use FSDP2 (fsdp_version: 2)."
            )
        return shape_of(self.parameter)

    @property
    def device(self) -> torch.device:
        """Device of the weight; the meta device if it has no values."""
        return self.parameter.device

    @property
    def value_bytes(self) -> int:
        """Size of `values()`."""
        return self.parameter.nbytes

    def values(self) -> torch.Tensor:
        """Return the weight as a floating tensor of its shape; if it is trained, gradients reach it."""
        return self.parameter

    def values_with(self, displaced: Sequence[Displaced]) -> torch.Tensor:
        """Return the values as they would be if these elements were put back, one set after another."""
        elements = self._elements()
        if displaced:
            elements = elements.clone()
            for positions, former in displaced:
                self._put(elements, positions, former)
        return self._values_of(elements)

    def take(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the elements at row-major positions (int64)."""
        return self._take(self._own_elements(), positions)

    def put(self, positions: torch.Tensor, elements: torch.Tensor) -> None:
        """Store what `take` returned, in place."""
        self._put(self._own_elements(), positions, elements)

    def switch_off(self, positions: torch.Tensor) -> None:
        """Store the element of the value zero at each of these positions, in place."""
        self.put(positions, torch.full_like(positions, self._zero(), dtype=self._elements().dtype))

    @contextmanager
    def replaced_by(self, values: torch.Tensor) -> Iterator[None]:
        """Let the module compute with other values of this weight, for layers that offer no other way.

        The parameter itself is untouched and is back when the context ends. Callers see to it that no other thread
        runs the module meanwhile.
        """
        # FSDP keeps a second entry under the same name, which comes first
        owner = self.module.__dict__ if self.name in self.module.__dict__ else self.module._parameters
        parameter = owner[self.name]
        owner[self.name] = values  # type: ignore[assignment]
        try:
            yield
        finally:
            owner[self.name] = parameter

    def _elements(self) -> torch.Tensor:
        if is_taken_away(self.parameter):
            raise ValueError(
                f"cannot reach the {self.name} of a {type(self.module).__name__}, of shape {tuple(self.shape)}: "
                "DeepSpeed ZeRO-3 keeps it in parts. Save the adapter, and load or merge it into a base model outside "
                "DeepSpeed."
            )
        if reason := self.reason_not_kept:
            raise ValueError(f"cannot reach the {self.name} of a {type(self.module).__name__}: {reason}.")
        return self.parameter.data

    def _own_elements(self) -> torch.Tensor:
        if is_sharded(self.parameter):
            raise ValueError(
                f"cannot merge into the {self.name} of a {type(self.module).__name__}, of shape {tuple(self.shape)}: "
                "it is sharded over processes. Save the adapter, and load and merge it into a whole base model."
            )
        return self._elements()

    def _values_of(self, elements: torch.Tensor) -> torch.Tensor:
        return elements

    def _zero(self) -> int:
        return 0

    def _take(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return take(elements, positions.to(elements.device))

    def _put(self, elements: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> None:
        put(elements, positions.to(elements.device), new.to(elements))
