"""What an adapter weighs, read from the file it was saved to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from peft_mask.format.packing import entropy_bits
from peft_mask.format.record import read_record

HEADS = ("classifier", "score")  # names of the task heads of transformers' classification models


def in_head(name: str) -> bool:
    """Whether a parameter or a key of a file belongs to the task head."""
    return any(part in HEADS for part in name.split("."))


def measure(folder: Path) -> dict[str, Any]:
    """Bytes of the safetensors file in `folder`, its head's bytes apart; of masks also sparsity and entropy.

    `bytes` is the size of the whole file, `head_bytes` that of the head's tensors in it. Over the masks,
    `entropy_bytes` is the sum of n H(p) / 8 with p the fraction of zeros among the n weights of a matrix, and
    `bits_per_weight` is 8 times the bytes of the mask tensors divided by the masked weights.
    """
    (path,) = folder.glob("*.safetensors")
    head = masks = weights = zeros = 0
    entropy_bytes = 0.0
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(key)
            if in_head(key):
                head += tensor.nbytes
            elif key.endswith(".peft_mask_bits"):
                record = read_record(tensor)
                size = math.prod(record.shape)
                masks += tensor.nbytes
                weights += size
                zeros += record.zeros
                entropy_bytes += entropy_bits(record.zeros, size) / 8
    figures: dict[str, Any] = {"bytes": path.stat().st_size, "head_bytes": head}
    if weights:
        figures |= {
            "sparsity": zeros / weights,
            "masked_weights": weights,
            "bits_per_weight": 8 * masks / weights,
            "entropy_bytes": entropy_bytes,
        }
    return figures
