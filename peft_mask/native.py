"""transformers' own door, `model.load_adapter` and all that calls it: records that come by name, past PEFT's hooks.

A record may have any length, and what is loaded by name must have the shape of what is there. So an adapter's
configuration says how long its records are, a layer makes room of that length, and a record that comes is checked and
decoded at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from peft_mask.config import MaskConfig
from peft_mask.layer import MaskLayer
from peft_mask.state import BITS, checked_bits, named


def record_sizes(tensors: Mapping[str, Tensor], adapter_name: str) -> list[int]:
    """Return what `MaskConfig.record_bytes` says of a file: the length of each record, in the order of module names.

    Args:
        tensors: what the file is made of, by name with the adapter's (see `records_of_adapter`).
        adapter_name: which adapter.
    """
    records = named(tensors, f"{BITS}.{adapter_name}")
    return [len(records[name]) for name in sorted(records)]


def sizes_by_module(config: MaskConfig, modules: Iterable[str]) -> dict[str, int]:
    """Return the length of each module's record in the file; nothing if it is unknown or said of other modules."""
    sizes, names = config.record_bytes or [], sorted(modules)
    return dict(zip(names, sizes, strict=True)) if len(names) == len(sizes) else {}


def make_room(layer: MaskLayer, adapter_name: str, config: MaskConfig, module_name: str, size: int) -> None:
    """Let a layer take an adapter's record by name.

    Args:
        layer: a layer that waits for the mask of the adapter.
        adapter_name: which adapter.
        config: its configuration.
        module_name: name of the layer, for messages.
        size: length of the record.
    """
    layer.peft_mask_bits.make_room(adapter_name, size, partial(_receive, layer, adapter_name, config, module_name))


def _receive(layer: MaskLayer, adapter_name: str, config: MaskConfig, module_name: str, data: Tensor) -> None:
    layer.peft_mask_bits.fill(adapter_name, checked_bits(module_name, layer, data, config))
