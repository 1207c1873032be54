"""Quantized weights: read dequantized, and switched off in their codes.

Zero has a code in the formats of bitsandbytes and in torchao's 8-bit one, and scales are stored apart from codes. So a
mask merges into a quantized weight without rounding: kept weights keep their codes, unmerging puts the others back.
Whatever else PEFT can dequantize is trained and computed with, but not merged into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn

from peft_mask.tensors.stored import Displaced, StoredWeight


def quantization_backend(module: nn.Module) -> QuantizationBackend | None:
    """Return what PEFT knows of how a module is quantized, or None if it is not."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return None
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_quantize_anew)


def _quantize_anew(*args: Any) -> None:
    raise AssertionError("a mask changes codes, and never quantizes anew")


def quantized_weight(module: nn.Module, backend: QuantizationBackend) -> StoredWeight:
    """Return the weight of a quantized module."""
    if backend.backend_name == "bnb 4bit":
        return Bnb4bitWeight(module)
    if backend.backend_name == "bnb 8bit":
        return Bnb8bitWeight(module)
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Tensor" and _is_symmetric(weight):
        return TorchaoInt8Weight(module)
    return DequantizedWeight(module, backend=backend)


def _is_symmetric(weight: Any) -> bool:
    return weight.zero_point is None or not bool(weight.zero_point.any())


def quantized_reason(module: nn.Module, backend: QuantizationBackend) -> str | None:
    """Return why a quantized module cannot be masked, or None if it can."""
    name = backend.backend_name
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        return f"{name} offers no way to dequantize its weight, without which a mask cannot be computed with"
    if backend.layer_type != "linear":
        return f"of the layers quantized by {name}, only linear ones are supported"
    weight: Any = getattr(module, "weight", None)
    if name == "bnb 4bit" and weight.quant_state is None:
        return "it is not quantized yet: move the model to its device first"
    if name == "bnb 8bit" and weight.dtype != torch.int8:
        return f"its weight has dtype {weight.dtype} and is not quantized yet: move the model to its device first"
    return None


def keep_codes_in_order(module: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit codes anew for its CPU kernel, and undo it where it has.

    It packs in the first forward pass in evaluation, rounding the scales to bfloat16, and it saves wrong scales when it
    unpacks (0.50.2: in another order, or quantized again). Unpacked here, the scales are those that were left.
    """
    layer = cast(Any, module)
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return
    layer.support_avx512bf16_for_cpu = False
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False
        layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        state.absmax = scales


class QuantizedWeight(StoredWeight):
    """What quantized weights share."""

    exact: ClassVar[bool | None] = False
    reason_not_kept: ClassVar[str | None] = None

    @property
    def value_bytes(self) -> int:
        return 2 * self.shape.numel()  # in the 16-bit dtype that quantized models compute with

    def values(self) -> torch.Tensor:
        return self._values_of(self._elements())


class Bnb4bitWeight(QuantizedWeight):
    """A weight of `bitsandbytes.nn.Linear4bit`: elements are 4-bit codes, two a byte, the first in the high half."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._state.shape)

    @property
    def _state(self) -> Any:
        return cast(Any, self.parameter).quant_state

    def _elements(self) -> torch.Tensor:
        return self.parameter.data.view(torch.uint8).reshape(-1)

    def _values_of(self, elements: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        codes = elements.view(self.parameter.dtype).view(self.parameter.shape)
        return dequantize_4bit(codes, self._state)

    def _zero(self) -> int:
        return int(self._state.code.abs().argmin())

    def _take(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        positions = positions.to(elements.device)
        pairs = elements[positions >> 1]
        return torch.where(positions & 1 == 1, pairs & 0x0F, pairs >> 4)

    def _put(self, elements: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> None:
        positions, new = positions.to(elements.device), new.to(elements.device)
        for low, kept, shift in ((0, 0x0F, 4), (1, 0xF0, 0)):
            # one half of the bytes at a time, since a byte may hold two of the positions
            chosen = positions & 1 == low
            index = positions[chosen] >> 1
            elements[index] = (elements[index] & kept) | (new[chosen] << shift)


class Bnb8bitWeight(QuantizedWeight):
    """A weight of `bitsandbytes.nn.Linear8bitLt`: int8 with a scale for each row."""

    def _values_of(self, elements: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = self.module.state
        # the scales move from the parameter to the layer's state in its first forward pass
        scales = cast(Any, self.parameter).SCB if state.SCB is None else state.SCB
        return int8_vectorwise_dequant(elements, scales)


class TorchaoInt8Weight(QuantizedWeight):
    """A weight that is torchao's `Int8Tensor`, symmetric: int8 with scales."""

    def values(self) -> torch.Tensor:
        return self.parameter.detach().dequantize()

    def values_with(self, displaced: Sequence[Displaced]) -> torch.Tensor:
        weight: Any = self.parameter.detach()
        if displaced:
            weight = weight.clone()
            for positions, former in displaced:
                self._put(weight.qdata, positions, former)
        return cast(torch.Tensor, weight.dequantize())

    def _elements(self) -> torch.Tensor:
        return cast(torch.Tensor, cast(Any, self.parameter).qdata)


@dataclass(frozen=True)
class DequantizedWeight(QuantizedWeight):
    """A weight that PEFT can dequantize, in a format with no exact zero, or one unknown here."""

    backend: QuantizationBackend = field(kw_only=True)

    @property
    def parameter(self) -> torch.Tensor:
        return next(self.module.parameters())  # it may have any name and shape; where it is, the weight is

    @property
    def shape(self) -> torch.Size:
        module = cast(nn.Linear, self.module)
        return torch.Size((module.out_features, module.in_features))

    def values(self) -> torch.Tensor:
        return self.backend.get_base_weight(self.module).detach()

    def values_with(self, displaced: Sequence[Displaced]) -> torch.Tensor:
        return self.values()

    def _elements(self) -> torch.Tensor:
        raise ValueError(
            f"cannot merge a mask into a weight quantized by {self.backend.backend_name}: it would have to be "
            "quantized anew, which changes the weights that are kept. Leave the adapter unmerged, it computes the same."
        )
