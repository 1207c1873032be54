"""An adapter as it lies in memory: the bytes of its file, masks still coded, with its head."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peft_mask.model.names import BITS, FOR_TRAINING, module_name, named
from peft_mask.serving.labels import read_names
from peft_mask.serving.source import CONFIG, LABELS, TENSORS
from peft_mask.settings.config import MaskConfig

_TRIES = 5  # to read files that belong together, while others write new ones
_LONGEST_CONFIG, _LONGEST_LABELS = 16 << 20, 1 << 20


@dataclass(frozen=True)
class CodedAdapter:
    """An adapter as it lies in memory.

    Attributes:
        file: (bytes,) uint8, the file's own bytes, or without what is for training only: records and head.
        digest: tells the files of one version from those of another.
        labels: names of its labels, in the order of the logits; None if it does not say.
        num_labels: how many labels its head has; None if that is not known, or not yet.
    """

    file: Tensor
    digest: str
    labels: tuple[str, ...] | None = None
    num_labels: int | None = None

    @classmethod
    def of(cls, data: bytes, digest: str, labels: tuple[str, ...] | None = None) -> CodedAdapter:
        """Keep the bytes of a safetensors file."""
        with torch.inference_mode(False):  # whoever asks first: the others could not tell when this changes
            return cls(torch.frombuffer(bytearray(data), dtype=torch.uint8), digest, labels)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.file.nbytes + sum(map(sys.getsizeof, self.labels or ()))

    def records(self) -> dict[str, Tensor]:
        """Return the records of its masks by module name, as views: they take no memory of their own."""
        raw = self.file.numpy()
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")  # the length of the index comes first
        index = json.loads(raw[8:start].tobytes())
        with torch.inference_mode(False):
            return named(
                {
                    key: self.file[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
                    for key, entry in index.items()
                    if key.endswith(BITS)
                },
                BITS,
            )

    def head(self) -> dict[str, Tensor]:
        """Return what it has beside the masks, by name in the file without PEFT's prefix."""
        tensors = load(self.file.numpy().tobytes())
        return {module_name(key): tensor for key, tensor in tensors.items() if not key.endswith(BITS)}


@dataclass(frozen=True)
class ReadAdapter:
    """What an adapter's folder holds, read and not checked.

    Attributes:
        config: its configuration.
        tensors: those of its file, without what is for training only.
        coded: what is kept of it.
    """

    config: MaskConfig
    tensors: Mapping[str, Tensor]
    coded: CodedAdapter


def read_adapter(folder: Path, max_bytes: int) -> ReadAdapter:
    """Read an adapter's folder, all files of one version.

    Args:
        folder: what `save_pretrained` wrote, and `labels.json` if the names of its labels are not in the configuration.
        max_bytes: how large its file may be at most.

    Raises:
        ValueError: a file is not there, damaged, too large, or of another method; the bare reason.
        OSError: a file cannot be read.
    """
    said, data, named_labels = _files(folder, max_bytes)
    config = _configuration(folder, said)
    try:
        with torch.inference_mode(False):
            tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"'{folder / TENSORS}' is not a whole safetensors file ({error}).") from error
    digest = hashlib.blake2b(said, digest_size=16)
    digest.update(data)
    labels = config.label_names
    if named_labels is not None:
        digest.update(named_labels)
        labels = read_names(folder / LABELS, named_labels)
    if kept := {name: tensor for name, tensor in tensors.items() if not name.endswith(FOR_TRAINING)}:
        data = data if len(kept) == len(tensors) else save(kept)
    return ReadAdapter(config, kept, CodedAdapter.of(data, digest.hexdigest(), labels))


def _files(folder: Path, max_bytes: int) -> tuple[bytes, bytes, bytes | None]:
    """Return what the configuration, the file of tensors and that of the labels' names hold."""
    for name, longest in ((CONFIG, _LONGEST_CONFIG), (TENSORS, max_bytes), (LABELS, _LONGEST_LABELS)):
        path = folder / name
        if name == LABELS and not path.exists():
            continue
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise ValueError(f"'{path}' {what}: give the folder that save_pretrained wrote.")
        if (size := path.stat().st_size) > longest:
            raise ValueError(f"'{path}' has {size:,} bytes, more than the {longest:,} that it may have.")
    for _ in range(_TRIES):
        said, data = _small_files(folder), (folder / TENSORS).read_bytes()
        if _small_files(folder) == said:
            break
    return said[0], data, said[1]


def _small_files(folder: Path) -> tuple[bytes, bytes | None]:
    labels = folder / LABELS
    return (folder / CONFIG).read_bytes(), labels.read_bytes() if labels.is_file() else None


def _configuration(folder: Path, said: bytes) -> MaskConfig:
    path = folder / CONFIG
    try:
        fields = json.loads(said)
        kind = fields.get("peft_type")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"'{path}' is no JSON object ({error}): download or save it again.") from error
    if kind != "PEFT_MASK":
        raise ValueError(f"it is not a mask, but of type {kind}.")
    try:
        config = MaskConfig.from_peft_type(**fields)
    except TypeError as error:
        raise ValueError(f"'{path}' is not the configuration of a mask ({error}).") from error
    config.inference_mode = True
    return config
