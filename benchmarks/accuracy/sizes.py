"""What an adapter weighs, read from the file it was saved to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from peft_mask import Masks

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
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        head = sum(file.get_tensor(key).nbytes for key in keys if in_head(key))
    figures: dict[str, Any] = {"bytes": path.stat().st_size, "head_bytes": head}
    if any(key.endswith(".peft_mask_bits") for key in keys):
        masks = Masks.load(folder)
        figures |= {
            "sparsity": masks.sparsity,
            "masked_weights": masks.weights,
            "bits_per_weight": masks.bits_per_weight,
            "entropy_bytes": masks.entropy * masks.weights / 8,
        }
    return figures


def bytes_on_base(folder: Path, base: nn.Module) -> int:
    """Size of a file of an adapter's masks alone, coded against their base as with `portable=False`."""
    with tempfile.TemporaryDirectory() as other:
        Masks.load(folder).save(other, base=base)
        (path,) = Path(other).glob("*.safetensors")
        return path.stat().st_size
