"""Which layer masks which type of module: thin shells that say what the base layer computes with another weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask.config import MaskConfig
from peft_mask.functional import apply_mask, masked_linear, masked_weight
from peft_mask.layer import MaskLayer
from peft_mask.packing import unpack_bits
from peft_mask.stored import StoredWeight

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Linear(MaskLayer):
    """A masked `nn.Linear` or transformers `Conv1D`: `y = x (W * M)^T + b`.

    The mask has the weight's own shape: (out, in) for `nn.Linear`, (in, out) for `Conv1D`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__(base_layer)
        self._transposed = isinstance(base_layer, Conv1D)
        self.in_features, self.out_features = self.mask_shape if self._transposed else self.mask_shape[::-1]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def _forward_under(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight, trained = self._under_bits(adapter_names)
        for adapter_name in trained[1:]:
            weight = masked_weight(weight, *self._scores_in_force(adapter_name))
        bias = cast("torch.Tensor | None", self.get_base_layer().bias)
        if not trained:
            return F.linear(x, weight.t() if self._transposed else weight, bias)
        scores, mask, positions = self._scores_in_force(trained[0])
        return masked_linear(x, weight, scores, bias, mask, positions, transposed=self._transposed)


class Conv(MaskLayer):
    """A masked `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with its stride, padding, dilation and groups.

    The mask has the shape of the weight, (out channels, in channels / groups, *kernel).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__(base_layer)
        convolution = cast(nn.Conv2d, base_layer)
        self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def _forward_under(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        return base._conv_forward(x, self.masked_weight(adapter_names), base.bias)

    def _get_name(self) -> str:
        return "peft_mask." + self.get_base_layer()._get_name()


class Embedding(MaskLayer):
    """A masked `nn.Embedding`. Only the rows looked up are masked, whatever the size of the table.

    The mask has the shape of the table, (embeddings, dimensions). As in the base layer, the row at `padding_idx` gets
    no gradient, and neither do its scores.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self.mask_shape
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def _forward_under(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = cast(nn.Embedding, self.get_base_layer())
        rows, index = x.unique(return_inverse=True)
        table = self.masked_rows(adapter_names, rows)
        if base.padding_idx is not None:
            table = torch.where((rows == base.padding_idx).unsqueeze(1), table.detach(), table)
        output = F.embedding(index, table, scale_grad_by_freq=base.scale_grad_by_freq)
        if (scale := self._get_embed_scale()) is not None:
            output = output * scale.to(output.dtype)
        return output

    def masked_rows(self, adapter_names: Sequence[str], rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of the table under the product of these adapters' masks.

        Args:
            adapter_names: the adapters.
            rows: int64, one dimension, ascending and distinct.

        Returns:
            (rows, dimensions) tensor; gradients reach the scores of these rows.
        """
        table = self.stored.values()[rows]
        for adapter_name in adapter_names:
            if adapter_name in self.peft_mask_scores:
                table = masked_weight(table, *self._scores_of_rows(adapter_name, rows))
            elif adapter_name in self.peft_mask_bits:
                table = apply_mask(table, self._mask_of_rows(adapter_name, rows))
        return table

    def _mask_of_rows(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        return unpack_bits(self.packed_mask(adapter_name)[rows], (len(rows), self.mask_shape[1]))

    def _scores_of_rows(
        self, adapter_name: str, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return scores, mask and positions as if these rows were all there is."""
        scores, mask, positions = self._scores_in_force(adapter_name)
        if positions is None:
            return scores[rows], None if mask is None else mask[rows], None
        # the candidates of a row stand together, from `first` on
        columns = self.mask_shape[1]
        first = torch.searchsorted(positions, (rows * columns).to(positions.dtype))
        counts = torch.searchsorted(positions, ((rows + 1) * columns).to(positions.dtype)) - first
        local_row = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        chosen = torch.arange(len(local_row), device=rows.device) + (first - (counts.cumsum(0) - counts))[local_row]
        local = positions[chosen] + (local_row - rows[local_row]) * columns
        return scores[chosen], None if mask is None else mask[chosen], local


class _StandIn(MaskLayer):
    """A masked module that others read attributes of; those it does not have are its base layer's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _mixed_forward(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        # The rows of the batch cannot be told apart here, which is right if none of their adapters is.
        if here := self.available_adapters & set(adapter_names):
            raise ValueError(
                f"{self._get_name()} cannot mix adapters in one batch, and it carries {sorted(here)}: run one batch "
                "for each."
            )
        return self.base_layer(*args, **kwargs)


class MultiheadAttention(_StandIn):
    """A masked `nn.MultiheadAttention` whose query, key and value have one width.

    Its input projection is masked here, with the shape (3 width, width), and its output projection by a layer of its
    own in the place of `out_proj`. Both weights are exchanged while the base layer runs, since it reads them directly.
    """

    _qkv_same_embed_dim = (
        False  # what keeps nn.TransformerEncoderLayer from computing attention with its weights itself
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__(base_layer)
        attention = cast(nn.MultiheadAttention, base_layer)
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim
        self._active_adapter = adapter_name
        attention.out_proj = Linear(attention.out_proj, adapter_name, config, _out_proj(name))  # type: ignore[assignment]
        super().update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MaskConfig, name: str) -> None:
        self._masked_out_proj().update_layer(adapter_name, config, _out_proj(name))
        super().update_layer(adapter_name, config, name)

    def _masked_out_proj(self) -> MaskLayer:
        return cast(MaskLayer, self.get_base_layer().out_proj)

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.get_base_layer(), "in_proj_weight")

    def _forward_under(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        projection = self._masked_out_proj()
        with (
            self.stored.replaced_by(self.masked_weight(adapter_names)),
            projection.stored.replaced_by(projection.masked_weight(adapter_names)),
        ):
            return self.base_layer(*args, **kwargs)

    def unmerge(self) -> None:
        super().unmerge()
        self._masked_out_proj().unmerge()  # in a forward pass with adapters disabled no one else would

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer whole again, for PEFT's unloading, which looks for this method."""
        base, projection = self.get_base_layer(), self._masked_out_proj()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base.out_proj = projection.get_base_layer()
        return base


class ParamWrapper(_StandIn):
    """A mask of one parameter of a module, such as the stacked weights of all experts: `target_parameters`.

    The parameter is exchanged while the module runs. Several parameters of a module have wrappers around each other,
    as PEFT makes them; it knows them by the name of this class.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str, parameter_name: str
    ) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name
        self.in_features, self.out_features = self.mask_shape[-1], self.mask_shape[-2:].numel() // self.mask_shape[-1]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.get_base_layer(), self.parameter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.stored.parameter.device)

    def _forward_under(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with self.stored.replaced_by(self.masked_weight(adapter_names)):
            return self.base_layer(*args, **kwargs)


def _out_proj(name: str) -> str:
    return f"{name}.out_proj"


def stored_weights(module: nn.Module, name: str) -> dict[str, StoredWeight]:
    """Return the weights of a module that its layer masks, by the names of their masks."""
    if isinstance(module, nn.MultiheadAttention):
        out_proj = module.out_proj
        base = out_proj.get_base_layer() if isinstance(out_proj, MaskLayer) else out_proj
        return {name: StoredWeight(module, "in_proj_weight"), _out_proj(name): StoredWeight(base)}
    return {name: StoredWeight(module)}


def mask_layer_type(module: nn.Module) -> type[Linear | Conv | Embedding | MultiheadAttention]:
    """Return the class of layers that mask modules like this one.

    Raises:
        ValueError: if there is none, or the module could not be masked; the bare reason.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            "nn.MultiheadAttention reads the weight of its out_proj directly and would ignore the mask; target the "
            "attention itself, which masks its projections"
        )
    base = next((base for base in _MASKED_BY if isinstance(module, base)), None)
    if base is None:
        raise ValueError(f"supported are {', '.join(base.__name__ for base in _MASKED_BY)}")
    if type(module).forward is not base.forward and not (base is nn.Embedding and hasattr(module, "embed_scale")):
        raise ValueError(f"{type(module).__name__} computes its output in its own way (a quantized layer?)")
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        raise ValueError("its query, key and value have weights of their own, as their widths differ")
    for stored in stored_weights(module, "").values():
        if not stored.parameter.is_floating_point():
            raise ValueError(f"its weight has dtype {stored.parameter.dtype}, which is not floating point")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError("its max_norm changes the weight in every forward pass")
    return _MASKED_BY[base]


_MASKED_BY: dict[type[nn.Module], type[Linear | Conv | Embedding | MultiheadAttention]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    **dict.fromkeys(_CONVOLUTIONS, Conv),
    nn.Embedding: Embedding,
    nn.MultiheadAttention: MultiheadAttention,
}
