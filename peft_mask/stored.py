"""The weight of a base layer, however it is stored: its values, and how some of them are switched off and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

Displaced = tuple[torch.Tensor, torch.Tensor]  # row-major positions, and what is stored there otherwise


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is stored as it is: a parameter of a floating dtype.

    Attributes:
        module: the layer that owns it.
        name: the parameter's name there.
    """

    module: nn.Module
    name: str = "weight"

    zero = 0  # what an element is set to that is switched off

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that holds the weight. Elements are read from it and written into it."""
        return cast(torch.Tensor, getattr(self.module, self.name))

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, and so of its masks."""
        return self.parameter.shape

    @property
    def is_meta(self) -> bool:
        """Whether the weight has no values."""
        return self.parameter.is_meta

    def values(self) -> torch.Tensor:
        """Return the weight as a floating tensor of its shape; if it is trained, gradients reach it."""
        return self.parameter

    def values_with(self, displaced: Sequence[Displaced]) -> torch.Tensor:
        """Return the values as they would be if these elements were put back, one set after another."""
        weight = self.parameter.data
        if displaced:
            weight = weight.clone()
            for positions, elements in displaced:
                weight.put_(positions.to(weight.device), elements.to(weight.device))
        return weight

    def take(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the elements at row-major positions (int64) as they are stored."""
        return self.parameter.data.take(positions)

    def put(self, positions: torch.Tensor, elements: torch.Tensor) -> None:
        """Store what `take` returned, in place."""
        weight = self.parameter.data
        weight.put_(positions.to(weight.device), elements.to(weight.device))

    def switch_off(self, positions: torch.Tensor) -> None:
        """Store a zero at each of these positions, in place."""
        self.put(positions, torch.full_like(positions, self.zero, dtype=self.parameter.dtype))

    @contextmanager
    def replaced_by(self, values: torch.Tensor) -> Iterator[None]:
        """Let the module compute with other values of this weight, for layers that offer no other way.

        The parameter itself is untouched and is back when the context ends. Another thread that runs the same module
        meanwhile sees the other values, too.
        """
        # FSDP keeps a second entry under the same name, which comes first
        owner = self.module.__dict__ if self.name in self.module.__dict__ else self.module._parameters
        parameter = owner[self.name]
        owner[self.name] = values  # type: ignore[assignment]
        try:
            yield
        finally:
            owner[self.name] = parameter
