"""Which layer masks which type of module."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask.format.mask_file import BIAS
from peft_mask.layers.bias import LayerWithBias, stored_bias
from peft_mask.layers.convolution import Conv
from peft_mask.layers.embedding import Embedding
from peft_mask.layers.hooks import is_replaced
from peft_mask.layers.linear import Linear, QuantizedLinear
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.own_forward import computes_as_linear
from peft_mask.layers.stand_in import MultiheadAttention, out_proj_name
from peft_mask.tensors.quantized import quantization_backend, quantized_reason, quantized_weight
from peft_mask.tensors.stored import StoredWeight


def stored_weights(module: nn.Module, name: str, biases: bool = False) -> dict[str, StoredWeight]:
    """Return the weights of a module that its layer masks, and its bias if asked for, by the names of their masks."""
    if biases and isinstance(module, _WITH_BIAS) and (bias := stored_bias(module)) is not None:
        return stored_weights(module, name) | {name + BIAS: bias}
    if isinstance(module, nn.MultiheadAttention):
        out_proj = module.out_proj
        base = out_proj.get_base_layer() if isinstance(out_proj, MaskLayer) else out_proj
        return {name: StoredWeight(module, "in_proj_weight"), out_proj_name(name): StoredWeight(base)}
    if (backend := quantization_backend(module)) is not None:
        return {name: quantized_weight(module, backend)}
    return {name: StoredWeight(module)}


def mask_layer_type(module: nn.Module) -> type[Linear | Conv | Embedding | MultiheadAttention]:
    """Return the class of layers that mask modules like this one.

    Raises:
        ValueError: if there is none, or the module could not be masked; the bare reason.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            "nn.MultiheadAttention reads the weight of its out_proj directly; target the attention itself, which masks "
            "its projections"
        )
    if (backend := quantization_backend(module)) is not None:
        if reason := quantized_reason(module, backend):
            raise ValueError(reason)
        return QuantizedLinear
    base = next((base for base in _MASKED_BY if isinstance(module, base)), None)
    if base is None:
        raise ValueError(f"supported are {', '.join(base.__name__ for base in _MASKED_BY)}")
    if type(module).forward is not base.forward and not (
        (base is nn.Embedding and hasattr(module, "embed_scale"))
        or (base is nn.Linear and computes_as_linear(cast(nn.Linear, module)))
    ):
        raise ValueError(f"{type(module).__name__} computes its output in its own way")
    if is_replaced(module):
        raise ValueError("its forward was replaced by another function, which a mask would put aside")
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        raise ValueError("its query, key and value have weights of their own, as their widths differ")
    for stored in stored_weights(module, "").values():
        if stored.reason_not_kept:
            raise ValueError(stored.reason_not_kept)
        if not stored.parameter.is_floating_point():
            raise ValueError(f"its weight has dtype {stored.parameter.dtype}, which is not floating point")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError("its max_norm changes the weight in every forward pass")
    return _MASKED_BY[base]


_MASKED_BY: dict[type[nn.Module], type[Linear | Conv | Embedding | MultiheadAttention]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: MultiheadAttention,
}
_WITH_BIAS = tuple(base for base, layer in _MASKED_BY.items() if issubclass(layer, LayerWithBias))
