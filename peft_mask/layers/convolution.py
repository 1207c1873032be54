"""Masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from peft_mask.layers.bias import LayerWithBias


class Conv(LayerWithBias):
    """A masked `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with its stride, padding, dilation and groups.

    The mask has the shape of the weight, (out channels, in channels / groups, *kernel).
    """

    @property
    def in_features(self) -> int:
        return cast(nn.Conv2d, self.get_base_layer()).in_channels

    def _compute(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        return base._conv_forward(x, self.masked_weight(adapter_names), self._bias(adapter_names))

    def _get_name(self) -> str:
        return "peft_mask." + self.get_base_layer()._get_name()
