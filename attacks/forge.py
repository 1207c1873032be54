"""Bytes that a forger would write: safetensors files and records with whatever is to be wrong in them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.victim import CONFIG, WEIGHTS
from peft_mask.format.checksums import checksum_of


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, tensors: bytes, length: int | None = None) -> bytes:
    """A safetensors file, whose header and its length may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def edit_file(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the adapter's safetensors file."""
    path = folder / WEIGHTS
    path.write_bytes(change(path.read_bytes()))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the safetensors file and leave the tensors' bytes."""

    def edited(data: bytes) -> bytes:
        header, tensors = split(data)
        change(header)
        return join(header, tensors)

    edit_file(folder, edited)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors, in a file that is well-formed, and make the checksums of what stands beside masks right."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    said = json.loads((folder / CONFIG).read_text()).get("checksums")
    if said is not None:
        for name in said["tensors"]:
            if (tensor := tensors.get(f"base_model.model.{name}")) is not None and not tensor.is_complex():
                said["tensors"][name] = checksum_of(name, tensor)
        edit_config(folder, checksums=said)


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of the configuration."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def key_of(module: str) -> str:
    """Name of a module's record in the file."""
    return f"base_model.model.{module}.peft_mask_bits"


def edit_record(folder: Path, module: str, change: Callable[[bytes], bytes], sealed: bool = True) -> None:
    """Change the record of a module; sealed: with its checksum made right again."""

    def edited(tensors: dict[str, Tensor]) -> None:
        data = change(tensors[key_of(module)].numpy().tobytes())
        tensors[key_of(module)] = as_tensor(seal(data) if sealed else data)

    edit_tensors(folder, edited)
    sizes = load_file(folder / WEIGHTS)
    # with the lengths of the new records in the configuration, or transformers' door would not look at them
    edit_config(folder, record_bytes=[len(sizes[key]) for key in sorted(sizes) if key.endswith("peft_mask_bits")])


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a record is stored."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def seal(record: bytes) -> bytes:
    """The record with its last four bytes replaced by the checksum of the others."""
    return record[:-4] + struct.pack("<I", zlib.crc32(record[:-4]))


def claim(shape: tuple[int, ...], zeros: int, payload: bytes = b"", codec: int = 1, version: int = 1) -> bytes:
    """A record that says these things of itself, of a base that nothing is known of."""
    head = struct.pack("<4s4B", b"PMSK", version, codec, len(shape), 0)
    return seal(head + struct.pack(f"<{len(shape)}IQ", *shape, zeros) + bytes(32) + payload + bytes(4))


def patched(offset: int, new: bytes) -> Callable[[bytes], bytes]:
    """Overwrite bytes from an offset on."""
    return lambda data: data[:offset] + new + data[offset + len(new) :]


def flipped(offset: int, bit: int = 0) -> Callable[[bytes], bytes]:
    """Flip one bit."""
    return lambda data: patched(offset, bytes([data[offset] ^ 1 << bit]))(data)
