"""Masked linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask.layers.rows import Rows
from peft_mask.layers.serving import ServedLinear
from peft_mask.scores.functional import masked_linear, masked_weight
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.quantized import keep_codes_in_order, quantization_backend, quantized_weight
from peft_mask.tensors.stored import StoredWeight


class Linear(ServedLinear):
    """A masked `nn.Linear` or transformers `Conv1D`: `y = x (W * M)^T + b`, with a mask of b as well if it has one.

    The mask has the weight's own shape: (out, in) for `nn.Linear`, (in, out) for `Conv1D`.
    """

    @staticmethod
    def input_dimension_of(base_layer: nn.Module) -> int | None:
        return 0 if isinstance(base_layer, Conv1D) else 1

    @property
    def _transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def in_features(self) -> int:
        return self.mask_shape[0 if self._transposed else 1]

    @property
    def out_features(self) -> int:
        return self.mask_shape[1 if self._transposed else 0]

    def _compute(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (patched := self._patched(adapter_names, x)) is not None:
            return patched
        return self._linear(x, *self._under_bits(adapter_names), self._bias(adapter_names))

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        trained: list[str],
        bias: torch.Tensor | None,
        again: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Apply `weight` under the scores of those adapters that are trained; `again` makes it once more."""
        for adapter_name in trained[1:]:
            weight = masked_weight(weight, *self._trained(adapter_name))
        if not trained:
            return F.linear(x, weight.t() if self._transposed else weight, bias)
        scores, *mask = self._trained(trained[0])
        tokens = self.rule(trained[0]).tokens if self.training else 1.0
        return masked_linear(x, weight, scores, bias, *mask, transposed=self._transposed, tokens=tokens, again=again)


class QuantizedLinear(Linear):
    """A masked linear layer whose weight is quantized: it computes with the dequantized weight under the mask.

    The dequantized weight is not kept for the backward pass but made again, and positions are packed, so that the model
    in training takes as little memory as it is quantized for.
    """

    packs_positions = True
    _base_is_the_product = False  # some quantize what goes in as well

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        backend = quantization_backend(base_layer)
        assert backend is not None
        self.quantization_backend: QuantizationBackend = backend
        keep_codes_in_order(base_layer)
        super().__init__(base_layer, adapter_name, config, name)

    @property
    def stored(self) -> StoredWeight:
        return quantized_weight(self.get_base_layer(), self.quantization_backend)

    def _compute(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = self._dtype_for(x)
        if (patched := self._patched(adapter_names, x.to(dtype))) is not None:
            return patched.to(x.dtype)
        bias = None if (bias := self._bias(adapter_names)) is None else bias.to(dtype)
        weight, trained = self._under_bits(adapter_names)
        weight = weight.to(dtype)

        def again() -> torch.Tensor:
            return self._under_bits(adapter_names)[0].to(dtype)

        if len(trained) == 1:
            return self._linear(x.to(dtype), weight, trained, bias, again).to(x.dtype)
        with _made_again(weight, again):
            return self._linear(x.to(dtype), weight, trained, bias).to(x.dtype)

    def _dtype_for(self, x: torch.Tensor) -> torch.dtype:
        return cast("torch.dtype | None", getattr(self.get_base_layer(), "compute_dtype", None)) or x.dtype

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        return super()._weight_for(x).to(self._dtype_for(x))

    def _compute_rows(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        return super()._compute_rows(rows, x.to(self._dtype_for(x))).to(x.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The base's codes: whoever reads them knows how they are quantized, and could do nothing with a mask."""
        return cast(torch.Tensor, self.get_base_layer().weight)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


@contextmanager
def _made_again(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Let autograd call `make` in the backward pass where it would have kept `tensor`."""
    storage, shape = tensor.untyped_storage()._cdata, tensor.shape
    del tensor  # autograd keeps `pack`, and with it all that it refers to

    def pack(saved: torch.Tensor) -> Any:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        return make if same else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved() if callable(saved) else saved):
        yield
