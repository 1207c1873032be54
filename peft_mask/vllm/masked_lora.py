"""What vLLM's LoRA machinery does where an adapter is a mask: load it, put it into a slot, compute with it.

These are functions on vLLM's objects; `mixed` puts them in the place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_mask.format.mask_file import read_config
from peft_mask.layers.correction import Zeros, corrected_product, zeros_of
from peft_mask.layers.rows import BASE
from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.off import Off
from peft_mask.vllm.routing import Tokens, slot_name

# in the objects' `__dict__`: vLLM's layers look up other names in their base layer
_SLOTS, _TOKENS, _MASKS = "_peft_mask_slots", "_peft_mask_tokens", "_peft_mask_positions"


def check_engine(config: Any) -> None:
    """Refuse an engine in which masks cannot be mixed.

    Args:
        config: vLLM's.

    Raises:
        ValueError: the reason.
    """
    model, parallel, lora = config.model_config, config.parallel_config, config.lora_config
    workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    for refused, reason in (
        (not model.enforce_eager, "it compiles or captures batches, which needs to be off: enforce_eager=True"),
        (workers > 1, f"its layers are spread over {workers} workers (tensor or pipeline parallelism)"),
        (model.quantization is not None, f"the base is quantized ({model.quantization})"),
        (model.is_multimodal_model, "the model takes more than text"),
        (lora.fully_sharded_loras, "fully_sharded_loras is set"),
    ):
        if refused:
            raise ValueError(
                f"masks cannot be mixed in this engine: {reason}. Change that, or switch masks with "
                "peft_mask.vllm.MaskExtension, or serve them merged."
            )


def is_mask(folder: str) -> bool:
    """Return whether an adapter's folder says that it holds masks."""
    file = Path(folder) / "adapter_config.json"
    return file.is_file() and read_config(file).get("peft_type") == "PEFT_MASK"


def positions_by_layer(
    off: Off, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Return where an adapter is off in the weights of vLLM's layers, of which some hold several weights.

    Args:
        off: the adapter in checkpoint coordinates.
        layers: the layers that vLLM would give a LoRA, by name.
        packed: name of such a layer -> names of those that it holds, in their order.
        checkpoint: of the base.

    Returns:
        Layer name -> (zeros,) int64 positions, row-major and ascending.

    Raises:
        ValueError: a mask is for something else than these layers, or a layer does not hold its weights as they are in
            the checkpoint. The message names it.
    """
    left, found = dict(off.positions), {}
    for name, layer in layers.items():
        parts = _weights_of(packed.get(name, [name]), checkpoint)
        if left.keys().isdisjoint(parts):
            continue
        _check_layer(name, layer)
        weight, start, positions = layer.base_layer.weight, 0, []
        for part in parts:
            own = checkpoint.weight(part)
            if part in left:
                positions.append(left.pop(part).long() + start)
                _check_values(part, weight, positions[-1], own.view(-1)[positions[-1] - start])
            start += own.numel()
        if start != weight.numel():
            raise ValueError(
                f"the layer '{name}' holds {weight.numel():,} weights, the checkpoint {start:,} of {parts}."
            )
        found[name] = torch.cat(positions)
    if left:
        raise ValueError(
            f"it masks {sorted(left)[:3]}, and in mixed batches linear layers alone are masked that vLLM gives a LoRA "
            f"(of this model {sorted({name.rpartition('.')[2] for name in layers})}): switch it with "
            "peft_mask.vllm.MaskExtension, or serve it merged."
        )
    return found


def _weights_of(parts: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """Return the weights that a layer is put together of; none if it is not made of the checkpoint's as they are."""
    try:
        return [checkpoint.weight_name(part) for part in parts]
    except ValueError:
        return []


def _check_layer(name: str, layer: Any) -> None:
    """Refuse a layer that does not compute `x W^T + b` in the method that is replaced."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.model_executor.layers import linear

    plain = (
        linear.ColumnParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.QKVParallelLinear,
        linear.RowParallelLinear,
    )
    ways = (BaseLinearLayerWithLoRA.apply, MergedColumnParallelLinearWithLoRA.apply)
    if (
        getattr(type(layer), "apply", None) not in ways
        or type(layer.base_layer) not in plain
        or type(layer.base_layer.quant_method) is not linear.UnquantizedLinearMethod
        or layer._enable_aux_cuda_stream
    ):
        raise ValueError(
            f"the layer '{name}', a {type(layer.base_layer).__name__}, computes in a way of its own "
            f"({type(layer).__name__}): switch the mask with peft_mask.vllm.MaskExtension, or serve it merged."
        )


def _check_values(name: str, weight: Tensor, positions: Tensor, base: Tensor) -> None:
    """Refuse a weight that does not hold what the checkpoint has where a mask is off."""
    inside = not len(positions) or int(positions[-1]) < weight.numel()
    if not inside or not torch.equal(weight.view(-1)[positions.to(weight.device)].cpu(), base.to(weight.dtype)):
        raise ValueError(
            f"the weight '{name}' is not in the model as it is in the base checkpoint: was it loaded from another one, "
            "or packed for a processor?"
        )


def remember(lora: Any, positions: Mapping[str, Tensor]) -> Any:
    """Return vLLM's empty LoRA as what it counts, evicts and puts into slots for a mask."""
    lora.__dict__[_MASKS] = positions
    return lora


def holds_masks(lora: Any) -> bool:
    """Return whether one of vLLM's LoRAs stands for a mask."""
    return _MASKS in lora.__dict__


def fill_slot(layers: Mapping[str, Any], slot: int, lora: Any) -> None:
    """Put an adapter's masks into a slot of all layers, in the place of what was there.

    Args:
        layers: the layers that vLLM would give a LoRA, by name.
        slot: which of them.
        lora: vLLM's LoRA; one that is no mask empties the slot.
    """
    positions = lora.__dict__.get(_MASKS, {})
    for name, layer in layers.items():
        slots = layer.__dict__.setdefault(_SLOTS, {})
        slots.pop(slot_name(slot), None)
        if name in positions:
            weight = layer.base_layer.weight
            slots[slot_name(slot)] = zeros_of(positions[name].to(weight.device), weight)


def tell(wrappers: Sequence[Any], tokens: Tokens) -> None:
    """Tell the layers whose the tokens of the next batch are, through what vLLM tells them by."""
    for wrapper in wrappers:
        wrapper.__dict__[_TOKENS] = tokens


def masked_output(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the output of a layer's product, with the mask of its own adapter for each token.

    Nothing here waits for a device: whose the tokens are is known on the host, and found once a call.

    Args:
        layer: one of vLLM's with LoRA.
        x: (..., in) tensor.
        bias: (out,) tensor or None.

    Returns:
        (..., out) tensor; None if no token of the batch has a mask in this layer.
    """
    slots: dict[str, Zeros] = layer.__dict__.get(_SLOTS, {})
    tokens: Tokens | None = layer.punica_wrapper.__dict__.get(_TOKENS)
    if tokens is None or not (known := slots.keys() & tokens.owners):
        return None
    flat = x.reshape(-1, x.shape[-1])
    sizes, _, order, back = tokens.rows(len(flat)).groups(len(flat), known, math.inf, x.device)
    own = [name for name in sizes if name != BASE]
    if not own:
        return None
    product = corrected_product(
        flat if order is None else flat.index_select(0, order),
        [sizes[name] for name in own],
        [slots[name] for name in own],
        layer.base_layer.weight,
        bias,
    )
    return (product if back is None else product.index_select(0, back)).view(*x.shape[:-1], product.shape[-1])
