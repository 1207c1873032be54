"""An adapter's folder -> where it is off in the weights of a base checkpoint. All is checked, and nothing changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peft_mask.format.packing import index_dtype, zero_positions
from peft_mask.model.loading import bits_for
from peft_mask.model.names import BITS, module_name, named
from peft_mask.serving.coded import read_adapter
from peft_mask.vllm.checkpoint import Checkpoint

_LARGEST = 8 << 30  # bytes of an adapter's file: a mask takes a twentieth of a bit a weight


@dataclass(frozen=True)
class Off:
    """What an adapter switches off, in checkpoint coordinates.

    Attributes:
        adapter: its folder; None for the base, which has nothing off.
        digest: tells its files of one version from those of another.
        positions: name of the weight in the checkpoint -> (zeros,) int32 or int64, row-major and ascending.
    """

    adapter: str | None = None
    digest: str | None = None
    positions: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def zeros(self) -> int:
        """How many weights are off."""
        return sum(len(own) for own in self.positions.values())


def read_off(folder: str, checkpoint: Checkpoint) -> Off:
    """Read an adapter for the weights of a base checkpoint.

    Args:
        folder: what `save_pretrained` or `Masks.save` wrote.
        checkpoint: of the base that is served.

    Raises:
        ValueError: it is not there, damaged, of another method or another base, or brings more than masks; the reason.
        OSError: a file cannot be read.
    """
    read = read_adapter(Path(folder), _LARGEST)
    records = named(read.tensors, BITS)
    beside = {module_name(key): tensor for key, tensor in read.tensors.items() if not key.endswith(BITS)}
    if own := sorted(name for name, tensor in beside.items() if not _is_the_bases(name, tensor, checkpoint)):
        raise ValueError(
            f"it brings {own[:3]} beside its masks, a head or embeddings of its own, which are no mask: serve it "
            "merged."
        )
    if not records:
        raise ValueError("its file holds no masks.")
    if (said := read.config.record_bytes) and said != [len(records[name]) for name in sorted(records)]:
        raise ValueError(
            f"its file holds other masks than the {len(said)} that its configuration speaks of: download or save it "
            "again."
        )
    positions: dict[str, Tensor] = {}
    for name, record in records.items():
        weight_name = checkpoint.weight_name(name)
        if weight_name in positions:
            raise ValueError(f"two of its masks are for the weight '{weight_name}', one of them that of '{name}'.")
        weight = checkpoint.weight(weight_name)
        bits = bits_for(name, record, weight, check_base=read.config.check_base)
        positions[weight_name] = zero_positions(bits, weight.shape).to(index_dtype(weight.numel()))
    return Off(folder, read.coded.digest, positions)


def _is_the_bases(name: str, tensor: Tensor, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is the checkpoint's own: PEFT saves embeddings that are masked beside their masks."""
    owner, _, attribute = name.replace(".base_layer.", ".").rpartition(".")
    if attribute != "weight":
        return False
    try:
        weight = checkpoint.weight(checkpoint.weight_name(owner))
    except ValueError:
        return False
    return weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight.dtype))
