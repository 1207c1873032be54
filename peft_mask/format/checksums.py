"""Checksums of what stands beside the records of a file: they have one of their own, and heads have none."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Beside = Mapping[str, tuple[Tensor, Sequence[int]]]  # name in the file, without prefix -> tensor, tokens of its rows


def checksum_of(name: str, tensor: Tensor, tokens: Sequence[int] = ()) -> str:
    """Return the checksum of a tensor: its dtype, a space, and a CRC-32 as eight hexadecimal digits.

    The CRC is that of the text `name dtype shape`, of the tensor's bytes in row-major order, and of the tokens whose
    rows it holds, 64 bits each; numbers are little-endian.

    Args:
        name: of the tensor in its file, without PEFT's prefix.
        tensor: of any dtype and device.
        tokens: indices of its rows in the whole embedding, for a tensor of `trainable_token_indices`.

    >>> checksum_of("classifier.bias", torch.zeros(2))
    'float32 d73ba474'
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    crc = zlib.crc32(f"{name} {dtype} {'x'.join(map(str, tensor.shape))}".encode())
    if tensor.numel():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    crc = zlib.crc32(struct.pack(f"<{len(tokens)}q", *tokens), crc)
    return f"{dtype} {crc:08x}"


def checksum_of_records(records: Mapping[str, Tensor]) -> str:
    """Return what tells the records of one save from those of another: a CRC-32 of the checksums that end them.

    Args:
        records: by module name.
    """
    crc = 0
    for name in sorted(records):
        crc = zlib.crc32(records[name][-4:].cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


def checksums_for(records: Mapping[str, Tensor], beside: Beside) -> dict[str, Any] | None:
    """Return the checksums of a file that is about to be written; None if it holds nothing beside its records."""
    tensors = {name: checksum_of(name, tensor, tokens) for name, (tensor, tokens) in sorted(beside.items())}
    return {"records": checksum_of_records(records), "tensors": tensors} if tensors else None


def check(checksums: Mapping[str, Any], records: Mapping[str, Tensor] | None, beside: Beside) -> None:
    """Compare what stands beside a file's records with what its configuration says.

    A process that was killed while it saved may have left new tensors under the old configuration. The records, which
    have checksums of their own, tell: where they are of another save, so are the checksums. What tokens an embedding's
    rows are for is said by the configuration alone, so those must fit in any case.

    Args:
        checksums: `MaskConfig.checksums`.
        records: the file's records by module name; None if they are not at hand.
        beside: what stands beside them.

    Raises:
        ValueError: if something is not what was saved; the message names it.
    """
    another_save = records is not None and checksum_of_records(records) != checksums["records"]
    for name, (tensor, tokens) in sorted(beside.items()):
        if another_save and not tokens:
            continue
        expected, found = checksums["tensors"].get(name, "none"), checksum_of(name, tensor, tokens)
        if found != expected:
            raise ValueError(
                f"cannot load '{name}': it is not what was saved. Its checksum in adapter_config.json is {expected}, "
                f"that of the file's tensor {found}. Download or save the adapter again. If you have changed the "
                'tensor on purpose, set "checksums": null in adapter_config.json.'
            )
