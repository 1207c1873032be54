"""What a mask is made of, when its model is cast: it goes to another device with it, but not to another dtype.

Scores count by their order. Cast to 16 bits, some of them would come out alike, or on the other side of the threshold,
and the mask would be another one than was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

Conversion = Callable[
    [Tensor], Tensor
]  # what `nn.Module._apply` is given, by `to`, `half`, `cuda`, `share_memory`, ...


def keeping_dtype(convert: Conversion, allowed: frozenset[torch.dtype] = frozenset()) -> Conversion:
    """Return a conversion of tensors without its casts, except those to a dtype that is allowed."""

    def move(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return converted if converted.dtype in {tensor.dtype, *allowed} else tensor.to(converted.device)

    return move


class _OwnDtype(nn.Module):
    """A container whose tensors keep their dtype when the model is cast."""

    allowed: ClassVar[frozenset[torch.dtype]] = frozenset()

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_dtype(fn, self.allowed), recurse)


class Scores(_OwnDtype, nn.ParameterDict):
    """Scores by adapter name. A model that is cast to float64 takes them along, as no order is lost in that."""

    allowed = frozenset({torch.float64})


class Integers(_OwnDtype, BufferDict):
    """Positions or packed bits by adapter name."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
