"""transformers' own door, `model.load_adapter` and all that calls it: records that come by name, past PEFT's hooks.

A record may have any length, and what is loaded by name must have the shape of what is there. So an adapter's
configuration says how long its records are, a layer makes room of that length, and a record that comes is checked and
decoded at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.format.checksums import check
from peft_mask.format.packing import bits_shape, count_zeros
from peft_mask.format.record import longest_record
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.beside import own_by_name
from peft_mask.model.loading import checked_bits
from peft_mask.model.names import BITS, layers_of_adapter, module_name, named
from peft_mask.model.restored import rebuilt_scores
from peft_mask.settings.config import MaskConfig


def record_sizes(tensors: Mapping[str, Tensor], adapter_name: str) -> list[int]:
    """Return what `MaskConfig.record_bytes` says of a file: the length of each record, in the order of module names.

    Args:
        tensors: what the file is made of, by name with the adapter's (see `records_of_adapter`).
        adapter_name: which adapter.
    """
    records = named(tensors, f"{BITS}.{adapter_name}")
    return [len(records[name]) for name in sorted(records)]


def make_room(model: nn.Module, adapter_name: str, config: MaskConfig) -> None:
    """Let the layers of an adapter take its records by name, if it is known how long these are.

    An adapter that is only used gets bits of them. One that is to be trained on gets scores, as with PEFT, of
    `init_margin` on either side of the threshold; if the file holds scores as well, these come after the records and by
    their own names.

    Args:
        model: the model with the layers.
        adapter_name: which adapter.
        config: its configuration.
    """
    layers = {module_name(path): layer for path, layer in layers_of_adapter(model, adapter_name).items()}
    if len(config.records_to_come) != len(layers):  # unknown, or of other modules
        return
    sizes = dict(zip(sorted(layers), config.records_to_come, strict=True))
    if any(size > longest_record(layers[name].mask_shape) for name, size in sizes.items()):
        return  # of no mask that fits: nothing of that size is to be made room for
    for name, size in sizes.items():
        layer = layers[name]
        layer.peft_mask_bits.make_room(adapter_name, size, partial(_receive, layer, adapter_name, config, name))
    if config.checksums is not None and config.inference_mode:
        first = layers[min(layers)]
        first.check_when_filled(adapter_name, partial(_check_beside, model, adapter_name, config.checksums))


def _check_beside(model: nn.Module, adapter_name: str, checksums: Mapping[str, Any]) -> None:
    """Refuse an adapter that came by name if what it trained whole is not what was saved; it has no mask then."""
    layers = layers_of_adapter(model, adapter_name)
    if any(layer.peft_mask_bits.is_open(adapter_name) for layer in layers.values()):
        return  # a mask that did not come raises when it is used
    own, kept = own_by_name(model, adapter_name), {}
    for name, (tensor, tokens) in own.items():
        dtype = checksums["tensors"].get(name, "").partition(" ")[0]
        if dtype in ("", f"{tensor.dtype}".removeprefix("torch.")):  # else transformers has cast it on the way
            kept[name] = tensor, tokens
    try:
        for name in checksums["tensors"]:  # by this door a tensor that no module asks for is only reported
            if name.endswith(".trainable_tokens_delta") and name not in own:
                raise ValueError(
                    f"cannot load '{name}': the configuration names no trainable_token_indices for it. Download or "
                    "save the adapter again."
                )
        check(checksums, None, kept)
    except ValueError:
        for name, layer in layers.items():
            layer.peft_mask_bits.wait_for(adapter_name, name, bits_shape(layer.mask_shape))
        raise


def _receive(layer: MaskLayer, adapter_name: str, config: MaskConfig, module_name: str, data: Tensor) -> None:
    bits = checked_bits(module_name, layer, data, config)
    if adapter_name in layer.peft_mask_bits:
        layer.peft_mask_bits.fill(adapter_name, bits)
        return
    current = layer.positions(adapter_name)
    scores, positions = rebuilt_scores(module_name, layer, bits, config, sparse=current is not None)
    with torch.no_grad():
        layer.peft_mask_scores[adapter_name].copy_(scores)
        if current is not None and positions is not None:
            layer.move_positions(adapter_name, positions)
    layer.peft_mask_bits.close(adapter_name)
    if layer.has_budget(adapter_name):  # scores that come yet may be of a budget that was growing, with more below zero
        layer.rest(adapter_name, count_zeros(bits, layer.mask_shape))
