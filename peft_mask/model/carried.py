"""What an adapter trained beside its masks, carried over to a file of other masks of the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as serialized

from peft_mask.format.atomic import replace_files
from peft_mask.format.checksums import checksum_of_records
from peft_mask.format.mask_file import read_config
from peft_mask.model.names import BITS, FOR_TRAINING, module_name, named

_WEIGHTS_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_FIELDS = (
    "task_type",
    "modules_to_save",
    "trainable_token_indices",
    "id2label",
)  # of what is carried; masks alone have none


def carry(adapter: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Copy heads and token embeddings of an adapter into a folder that `Masks.save` wrote; `Masks` leaves them out.

    Scores, which belong to the adapter's own masks, stay behind. The tensors are the same bytes, and the target's
    configuration says of them what that of the adapter does, their checksums included.

    Args:
        adapter: folder of the adapter that has them.
        target: folder of the masks; its two files are replaced.

    Returns:
        The names of what was carried, without PEFT's prefix; none if the adapter has masks alone.
    """
    source, place = Path(adapter), Path(target)
    tensors = load_file(source / _WEIGHTS_FILE)
    beside = {name: tensor for name, tensor in tensors.items() if not name.endswith((BITS, *FOR_TRAINING))}
    if not beside:
        return []
    masks = load_file(place / _WEIGHTS_FILE)
    learned, made = (read_config(folder / _CONFIG_FILE) for folder in (source, place))
    made |= {field: learned.get(field) for field in _FIELDS}
    names = sorted(module_name(name) for name in beside)
    if isinstance(checksums := learned.get("checksums"), dict):
        known = {name: said for name, said in checksums.get("tensors", {}).items() if name in names}
        made["checksums"] = {"records": checksum_of_records(named(masks, BITS)), "tensors": known}
    text = json.dumps(made, indent=2, sort_keys=True) + "\n"
    data = serialized({**masks, **beside}, metadata={"format": "pt"})
    replace_files({place / _WEIGHTS_FILE: data, place / _CONFIG_FILE: text.encode()})
    return names
