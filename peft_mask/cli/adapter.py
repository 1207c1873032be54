"""An adapter's folder, or its id on the Hub -> what stands in its files, without its base and without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from peft_mask.format.mask_file import read_config, read_headers
from peft_mask.format.payload import RANKS
from peft_mask.format.record import CODECS, Header
from peft_mask.model.names import BITS, FOR_TRAINING, module_name
from peft_mask.serving.errors import AdapterRefusedError
from peft_mask.serving.source import CONFIG, TENSORS, fetched, is_hub_id

CODEC_NAMES = {0: "bits", 1: "gaps", 2: "ranks against the base", 3: "blocks", 4: "groups"}
# beside masks and heads: names of labels, card, curves, and a tokenizer, for an adapter may bring tokens of its own
COMPANIONS = (
    "labels.json",
    "README.md",
    "trainer_state.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Matrix:
    """One mask, as its header says.

    Attributes:
        name: of the module.
        header: shape, zeros, fingerprint and codec.
        bytes: of its record.
    """

    name: str
    header: Header
    bytes: int

    @property
    def weights(self) -> int:
        """How many weights it masks."""
        return math.prod(self.header.shape)


@dataclass(frozen=True)
class Adapter:
    """What stands in an adapter's files.

    Attributes:
        name: what the user called it.
        folder: where it lies.
        config: what `adapter_config.json` says; empty if there is none.
        masks: in the order of the file.
        beside: dtype, shape and bytes of the tensors of heads and embeddings, by name without PEFT's prefix.
        scores: bytes of what was kept to resume a training from.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    masks: list[Matrix]
    beside: dict[str, tuple[str, tuple[int, ...], int]]
    scores: int

    @property
    def weights(self) -> int:
        """How many weights are masked."""
        return sum(mask.weights for mask in self.masks)

    @property
    def zeros(self) -> int:
        """How many weights are off."""
        return sum(mask.header.zeros for mask in self.masks)

    @property
    def mask_bytes(self) -> int:
        """Bytes of all records."""
        return sum(mask.bytes for mask in self.masks)

    @property
    def file_bytes(self) -> int:
        """Bytes of `adapter_model.safetensors`."""
        return (self.folder / TENSORS).stat().st_size

    @property
    def portable(self) -> bool:
        """Whether it is read without its base."""
        return all(mask.header.codec != RANKS for mask in self.masks)

    @property
    def format_version(self) -> int:
        """The newest version among its records."""
        codecs = {mask.header.codec for mask in self.masks}
        return max(version for version, known in CODECS.items() if codecs & set(known))


def folder_of(place: str) -> Path:
    """Return the folder of an adapter: as it is, that of a file in it, or downloaded from the Hub.

    Raises:
        ValueError: it is none of these, or is on the Hub and cannot be downloaded.
    """
    path = Path(place)
    if path.is_dir():
        return path
    if path.is_file() and path.name in (CONFIG, TENSORS):
        return path.parent
    if path.exists():
        raise ValueError(f"'{place}' is no adapter: give the folder that holds {TENSORS}.")
    if not is_hub_id(place):
        raise ValueError(f"there is no folder '{place}', and it is no id on the Hub like 'user/name': check the name.")
    try:
        return fetched(place, place, (CONFIG, TENSORS, *COMPANIONS))
    except AdapterRefusedError as error:
        raise ValueError(
            f"there is no folder '{place}', and {_first_line(error.reason)} Check the name, the network and your "
            "login, or give a folder."
        ) from error


def read_adapter(place: str) -> Adapter:
    """Read what stands in the files of an adapter.

    Args:
        place: a folder, or an id on the Hub.

    Raises:
        ValueError: there is no such adapter, it is damaged, or of another method. The message names it.
    """
    folder = folder_of(place)
    file = folder / TENSORS
    if not file.is_file():
        raise ValueError(f"'{place}' holds no {TENSORS}: give the folder that save_pretrained wrote.")
    config = read_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("peft_type", "PEFT_MASK") != "PEFT_MASK":
        raise ValueError(f"'{place}' is no mask but an adapter of PEFT's method {config['peft_type']!r}.")
    masks = [Matrix(name, header, length) for name, (header, length) in read_headers(file).items()]
    beside, scores = {}, 0
    with safe_open(file, framework="pt") as tensors:
        for key in sorted(tensors.keys()):
            if key.endswith(BITS):
                continue
            part = tensors.get_tensor(key)
            if key.endswith(FOR_TRAINING):
                scores += part.nbytes
            else:
                dtype = str(part.dtype).removeprefix("torch.")
                beside[module_name(key)] = dtype, tuple(part.shape), part.nbytes
    return Adapter(place, folder, config, masks, beside, scores)


def _first_line(reason: str) -> str:
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "")
    return first[:300].rstrip(".(") + "."
