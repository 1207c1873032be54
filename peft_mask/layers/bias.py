"""Masks of biases: `mask_biases`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peft_mask.format.mask_file import BIAS
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.stored import StoredWeight


def stored_bias(base_layer: nn.Module) -> StoredWeight | None:
    """Return the bias of a layer, if it has one that can be masked: attention reads its output's past that layer."""
    if getattr(base_layer, "bias", None) is None or isinstance(
        base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return None
    return StoredWeight(base_layer, "bias")


class Bias(MaskLayer):
    """The mask of a layer's bias, with scores, candidates, budget and record of its own: a vector.

    It stands in the layer that masks the weight, as its `bias_mask`, and is named so in the file. It computes nothing
    by itself.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__(base_layer, adapter_name, config, name)
        # a reference, not a child: the parameters are the other layer's, and would be in each state dict twice
        del self.base_layer
        object.__setattr__(self, "base_layer", base_layer)

    @staticmethod
    def input_dimension_of(base_layer: nn.Module) -> int | None:
        return None

    @property
    def in_features(self) -> int:
        return self.mask_shape[0]

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.get_base_layer(), "bias")


class LayerWithBias(MaskLayer):
    """A masked layer whose bias may be masked as well."""

    def update_layer(self, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().update_layer(adapter_name, config, name)
        base_layer, mask = self.get_base_layer(), self._bias_mask()
        if config.mask_biases and stored_bias(base_layer) is not None:
            if mask is None:
                self.bias_mask = Bias(base_layer, adapter_name, config, name + BIAS)
            else:
                mask.update_layer(adapter_name, config, name + BIAS)
        elif mask is not None and adapter_name in mask.available_adapters:
            mask.delete_adapter(adapter_name)  # left of one that was refused

    def parts(self) -> tuple[nn.Module, ...]:
        mask = self._bias_mask()
        return super().parts() if mask is None else (*super().parts(), *mask.parts())

    def _bias_mask(self) -> Bias | None:
        return getattr(self, "bias_mask", None)

    def _bias(self, adapter_names: Sequence[str]) -> torch.Tensor | None:
        """Return the bias under these adapters."""
        mask = self._bias_mask()
        if mask is None:
            bias: torch.Tensor | None = self.get_base_layer().bias  # type: ignore[assignment]
            return bias
        return mask.masked_weight(adapter_names)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The bias that the layer computes with (see `weight_in_force`)."""
        mask = self._bias_mask()
        return self._bias(()) if mask is None else mask.weight_in_force()

    def unmerge(self) -> None:
        super().unmerge()
        if (mask := self._bias_mask()) is not None:
            mask.unmerge()  # in a forward pass with adapters disabled no one else would
