"""Checksums of what stands beside the records of a file."""

import struct
import zlib

import pytest
import torch

from peft_mask.format.checksums import check, checksum_of, checksums_for
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.packing import pack_bits
from peft_mask.format.record import write_record

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool]


def record(seed):
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) > 0.3
    return write_record(pack_bits(mask), mask.shape, UNKNOWN)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_the_format_page_says(dtype, shape):
    tensor = (torch.arange(torch.Size(shape).numel()) * 3 % 7).view(shape).to(dtype)
    name = str(dtype).removeprefix("torch.")
    text = f"head.weight {name} {'x'.join(str(size) for size in shape)}".encode()
    data = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    assert checksum_of("head.weight", tensor) == f"{name} {zlib.crc32(text + data):08x}"
    tokens = [7, 2**40]
    crc = zlib.crc32(text + data + struct.pack("<2q", *tokens))
    assert checksum_of("head.weight", tensor, tokens) == f"{name} {crc:08x}"


def test_it_is_that_of_the_values_however_they_lie_in_memory():
    tensor = torch.randn(6, 4)
    assert checksum_of("a", tensor.t()) == checksum_of("a", tensor.t().contiguous())
    assert checksum_of("a", tensor[::2]) == checksum_of("a", tensor[::2].clone())


def test_whatever_is_changed_is_named():
    tensor, tokens = torch.randn(4, 4), [3, 5, 8, 9]
    records, beside = {"m": record(0)}, {"head.weight": (tensor, ()), "tokens": (tensor, tokens)}
    said = checksums_for(records, beside)
    check(said, records, beside)
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 1] ^= 1
    for name, changed in {
        "head.weight": [
            (flipped, ()),
            (tensor.bfloat16(), ()),
            (tensor.view(2, 8), ()),
            (tensor.view(torch.int32), ()),
        ],
        "tokens": [(tensor, [3, 5, 8, 10]), (tensor, [5, 3, 8, 9])],
        "of no name": [(tensor, ())],
    }.items():
        for other in changed:
            with pytest.raises(
                ValueError, match=rf"cannot load '{name}': it is not what was saved.*\"checksums\": null"
            ):
                check(said, records, {**beside, name: other})


def test_of_another_save_only_what_the_configuration_says_of_tokens_is_checked():
    tensor = torch.randn(4, 4)
    said = checksums_for({"m": record(0)}, {"head": (tensor, ()), "tokens": (tensor, [1, 2, 3, 4])})
    check(said, {"m": record(1)}, {"head": (tensor + 1, ())})
    with pytest.raises(ValueError, match="cannot load 'tokens'"):
        check(said, {"m": record(1)}, {"tokens": (tensor, [1, 2, 3, 5])})


def test_masks_alone_need_none():
    assert checksums_for({"m": record(0)}, {}) is None
