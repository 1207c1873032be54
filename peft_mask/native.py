"""transformers' own door, `model.load_adapter` and all that calls it: records that come by name, past PEFT's hooks.

A record may have any length, and what is loaded by name must have the shape of what is there. So an adapter's
configuration says how long its records are, a layer makes room of that length, and a record that comes is checked and
decoded at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from peft_mask.config import MaskConfig
from peft_mask.layer import MaskLayer
from peft_mask.state import BITS, checked_bits, named, rebuilt_scores


def record_sizes(tensors: Mapping[str, Tensor], adapter_name: str) -> list[int]:
    """Return what `MaskConfig.record_bytes` says of a file: the length of each record, in the order of module names.

    Args:
        tensors: what the file is made of, by name with the adapter's (see `records_of_adapter`).
        adapter_name: which adapter.
    """
    records = named(tensors, f"{BITS}.{adapter_name}")
    return [len(records[name]) for name in sorted(records)]


def sizes_by_module(config: MaskConfig, modules: Iterable[str]) -> dict[str, int]:
    """Return the length of each module's record in the file to be loaded; nothing if unknown, or of other modules."""
    sizes, names = config.records_to_come, sorted(modules)
    return dict(zip(names, sizes, strict=True)) if len(names) == len(sizes) else {}


def make_room(layer: MaskLayer, adapter_name: str, config: MaskConfig, module_name: str, size: int) -> None:
    """Let a layer take an adapter's record by name: as bits or, if the adapter is to be trained on, as scores.

    The latter start as with PEFT, from `init_margin` on either side of the threshold; if the file holds scores as well,
    these come after the record and by their own names.

    Args:
        layer: a layer with the adapter.
        adapter_name: which adapter.
        config: its configuration.
        module_name: name of the layer, for messages.
        size: length of the record.
    """
    layer.peft_mask_bits.make_room(adapter_name, size, partial(_receive, layer, adapter_name, config, module_name))


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
            current.copy_(positions)
    layer.peft_mask_bits.close(adapter_name)
