"""Masked modules that cannot be called with a weight, which is exchanged while they run: attention, stacked experts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from peft_mask.layers.hooks import parts_in_use
from peft_mask.layers.linear import Linear
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.rows import Rows
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.stored import StoredWeight

_RUNNING = threading.RLock()  # of all such modules, since a module with a lock of its own could not be copied


class _StandIn(MaskLayer):
    """A masked module that others read attributes of: those it does not have are its base layer's, the weight masked.

    Threads run such modules one after the other: a weight that one has exchanged must not be met by another.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self.weight_in_force() if name == self.stored.name else getattr(self.base_layer, name)

    @property
    def weight(self) -> Any:
        return self.__getattr__("weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.compiler.is_compiling() else _RUNNING:
            return super().forward(*args, **kwargs)

    def _mixed_forward(self, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        self.check_not_merged()
        # The rows of the batch cannot be told apart here, which is right if none of their adapters is.
        if here := self.available_adapters & rows.owners:
            raise ValueError(
                f"{self._get_name()} cannot mix adapters in one batch, and it carries {sorted(here)}: run one batch "
                "for each."
            )
        return self.base_layer(*args, **kwargs)


class MultiheadAttention(_StandIn):
    """A masked `nn.MultiheadAttention` whose query, key and value have one width.

    Its input projection is masked here, with the shape (3 width, width), and its output projection by a layer of its
    own in the place of `out_proj`, of which the base layer reads the weight. The former is exchanged while it runs.
    """

    # keeps nn.TransformerEncoderLayer from computing attention itself, with the base weights
    _qkv_same_embed_dim = False

    def update_layer(self, adapter_name: str, config: MaskConfig, name: str) -> None:
        base, out_proj = self.get_base_layer(), out_proj_name(name)
        if isinstance(base.out_proj, MaskLayer):
            base.out_proj.update_layer(adapter_name, config, out_proj)
        else:
            base.out_proj = Linear(cast(nn.Module, base.out_proj), adapter_name, config, out_proj)
        super().update_layer(adapter_name, config, name)

    def _masked_out_proj(self) -> MaskLayer:
        return cast(MaskLayer, self.get_base_layer().out_proj)

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.get_base_layer(), "in_proj_weight")

    def _forward_under(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with (
            parts_in_use(self.get_base_layer(), self.parts()),
            self.stored.replaced_by(self.masked_weight(adapter_names)),
        ):
            return self.base_layer(*args, **kwargs)

    def unmerge(self) -> None:
        super().unmerge()
        self._masked_out_proj().unmerge()  # in a forward pass with adapters disabled no one else would

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer whole again, for PEFT's unloading, which looks for this method.

        `MaskModel` has merged or unmerged all layers before, and asks for neither.
        """
        base = self.get_base_layer()
        base.out_proj = self._masked_out_proj().get_base_layer()
        return base


class ParamWrapper(_StandIn):
    """A mask of one parameter of a module, such as the stacked weights of all experts: `target_parameters`.

    The parameter is exchanged while the module runs. Several parameters of a module have wrappers around each other,
    as PEFT makes them; it knows them by the name of this class.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str, parameter_name: str
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, name)

    @staticmethod
    def input_dimension_of(base_layer: nn.Module) -> int | None:
        return None  # the parameter may have any layout

    @property
    def in_features(self) -> int:
        return self.mask_shape[-1]

    @property
    def out_features(self) -> int:
        return self.mask_shape[-2]

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.get_base_layer(), self.parameter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.stored.device)

    def _forward_under(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with (
            parts_in_use(self.get_base_layer(), self.parts()),
            self.stored.replaced_by(self.masked_weight(adapter_names)),
        ):
            return self.base_layer(*args, **kwargs)


def out_proj_name(name: str) -> str:
    """Return the name of the output projection's mask in an attention module of this name, as the file has it."""
    return f"{name}.base_layer.out_proj"
