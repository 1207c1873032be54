"""The table of hostile adapters: what each does to a good one, and by which doors it may come in all the same."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.doors import DOORS, HOTSWAP, MASKS, NATIVE, PEFT, SECOND
from attacks.forge import (
    as_tensor,
    claim,
    edit_config,
    edit_file,
    edit_header,
    edit_record,
    edit_tensors,
    flipped,
    join,
    key_of,
    patched,
    split,
)
from attacks.victim import CONFIG, HEAD, KEY, PADDED, QUERY, WEIGHTS, save_adapter
from peft_mask import MaskConfig

Change = Callable[[Path], Any]
Raised = type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True)
class Case:
    """A hostile adapter.

    Attributes:
        name: what is wrong with it.
        change: makes it of a good adapter, a folder of its own.
        codec: which of the good adapters it is made of.
        loads: doors by which it comes in, in words why that does no harm. All others must refuse it.
        raises: doors at which PEFT or transformers refuse it by an exception that says little, and which.
        or_refused: whether the doors of `loads` may refuse it as well.
        rewrites: doors by which it changes the base model, with every method of PEFT's.
    """

    name: str
    change: Change
    codec: str = "gaps"
    loads: tuple[tuple[str, str], ...] = ()
    raises: tuple[tuple[str, Raised], ...] = ()
    or_refused: bool = False
    rewrites: tuple[str, ...] = ()


NO_CONFIG = (MASKS, "reads masks, and keeps the configuration as it is")
NO_HEAD = (MASKS, "reads masks only")
UNASKED = (NATIVE, "what no module asks for is not read")
MISSED = (NATIVE, "a mask that did not come raises on first use")
BASE_SHAPES = ((64, 32), (32, 32), (32,), (3, 32))  # of those that the model has, and the file is to bring
LAST = "safetensors takes the last of two, by every door"
NO_BASE = (MASKS, "has no base model to compare with")
BY_NAME = (NATIVE, "transformers loads by name whatever has one, of every method: see SECURITY.md")


def cases() -> list[Case]:
    """Every case, in the order of the parts of an adapter."""
    return [*_containers(), *_names(), *_records(), *_heads(), *_configurations(), *_folders()]


# ---- the safetensors file ----


def _containers() -> Iterator[Case]:
    for where, offset in _boundaries():
        yield Case(
            f"file cut {where}", lambda folder, offset=offset: edit_file(folder, lambda data: data[: offset(data)])
        )
    for byte in (0, 1, 7, 8, 9, 20, 40, 80, 160, 320):
        yield Case(f"bit flipped in byte {byte}, of the header", lambda f, byte=byte: edit_file(f, flipped(byte, 4)))
    yield Case("file longer by a byte", lambda folder: edit_file(folder, lambda data: data + b"\0"))
    for claimed in (0, 1, 2**32, 2**63, 2**64 - 1):
        yield Case(
            f"header of {claimed:,} bytes claimed", lambda f, n=claimed: edit_file(f, patched(0, struct.pack("<Q", n)))
        )
    for what, text in {
        "not JSON": b"{" * 50,
        "nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a list": b"[]",
        "not UTF-8": b'{"\xff":1}',
        "empty": b"{}",
        "of 20 MB of spaces": b"{}" + b" " * (20 << 20),
        "of 20,000 names": json.dumps(
            {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ).encode(),
    }.items():
        well_formed = text.startswith((b"{}", b'{"t'))
        yield Case(
            f"header {what}",
            lambda f, text=text: (f / WEIGHTS).write_bytes(join(text, b"")),
            loads=(MISSED,) if well_formed else (),
            raises=tuple((door, KeyError) for door in (PEFT, SECOND)) if well_formed else (),
        )
    for what, fields in {
        "shape of 2^64 bytes": {"shape": [2**32, 2**32]},
        "shape of 2^50 bytes": {"shape": [2**50]},
        "negative shape": {"shape": [-1]},
        "offsets beyond the file": {"data_offsets": [0, 2**40]},
        "offsets in reverse": {"data_offsets": [80, 0]},
        "offsets that wrap around": {"data_offsets": [2**64 - 1, 80]},
        "unknown dtype": {"dtype": "F1"},
        "dtype of another size": {"dtype": "F64"},
    }.items():
        yield Case(
            f"header with a {what}" if what[0] not in "ou" else f"header with {what}",
            lambda f, fields=fields: edit_header(f, lambda header: header[key_of(QUERY)].update(fields)),
        )
    yield Case(
        "two tensors in the same bytes",
        lambda f: edit_header(f, lambda header: header[key_of(QUERY)].update(header[key_of(KEY)])),
    )
    yield Case("a name twice in the header", _name_twice, loads=tuple((door, LAST) for door in DOORS))
    yield Case(
        "a pickle under the name of the safetensors file",
        lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Intruder(folder / "intruder"))),
    )
    yield Case("a pickle as adapter_model.bin", _pickle_in_place)


def _boundaries() -> Iterator[tuple[str, Callable[[bytes], int]]]:
    yield "to nothing", lambda data: 0
    yield "inside the length of the header", lambda data: 5
    yield "before the header", lambda data: 8
    yield "inside the header", lambda data: 100
    yield "before the last byte of the header", lambda data: len(data) - len(split(data)[1]) - 1
    yield "before the tensors", lambda data: len(data) - len(split(data)[1])
    for index in range(3):
        yield f"before tensor {index + 1}", lambda data, i=index: _start(data, i)
        yield f"inside tensor {index + 1}", lambda data, i=index: _start(data, i) + 9
    yield "before the last byte", lambda data: len(data) - 1


def _start(data: bytes, index: int) -> int:
    header, tensors = split(data)
    starts = sorted(entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")
    return len(data) - len(tensors) + starts[index]


def _name_twice(folder: Path) -> None:
    def edited(data: bytes) -> bytes:
        header, tensors = split(data)
        first = json.dumps({key_of(QUERY): header[key_of(KEY)]}).encode()
        return join(first[:-1] + b"," + json.dumps(header).encode()[1:], tensors)

    edit_file(folder, edited)


class Intruder:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def _pickle_in_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Intruder(folder / "intruder"), protocol=2))


# ---- the names of its tensors ----


def _names() -> Iterator[Case]:
    def renamed(new: str) -> Change:
        return lambda folder: edit_tensors(folder, lambda t: t.update({new: t.pop(key_of(QUERY))}))

    def added(name: str, tensor: Tensor) -> Change:
        return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))

    as_a_name = (MASKS, "a name is a name here, and never a path")
    for name in (
        "../../../tmp/x.peft_mask_bits",
        "/etc/passwd.peft_mask_bits",
        "..peft_mask_bits",
        "a\0b.peft_mask_bits",
    ):
        yield Case(f"a mask called {name!r}", renamed(name), loads=(MISSED, as_a_name))
    yield Case("a mask of another module", renamed(key_of("bert.other")), loads=(MISSED, as_a_name))
    yield Case("a mask missing", lambda f: edit_tensors(f, lambda t: t.pop(key_of(QUERY))), loads=(MISSED, as_a_name))
    yield Case("no masks", lambda folder: edit_tensors(folder, _without_masks), loads=(MISSED,))
    yield Case(
        "a module's mask twice, under two names",
        lambda folder: edit_tensors(folder, _twice),
        loads=((NATIVE, "transformers takes one of them, which is checked"),),
    )
    for what, name, tensor in (
        ("a weight of the base", "base_model.model.bert.embeddings.word_embeddings.weight", torch.zeros(64, 32)),
        ("a masked weight", f"base_model.model.{QUERY}.base_layer.weight", torch.zeros(32, 32)),
        ("a bias of a masked layer", f"base_model.model.{QUERY}.base_layer.bias", torch.ones(32)),
        ("the head of the base", f"base_model.model.{HEAD}.original_module.weight", torch.zeros(3, 32)),
        ("the mask of another adapter", f"{key_of(QUERY)}.default", torch.zeros(32, 4, dtype=torch.uint8)),
        ("a tensor of no module", "base_model.model.bert.extra", torch.zeros(2)),
        ("a tensor without a name", "", torch.zeros(2)),
    ):
        yield Case(
            f"{what} in the file",
            added(name, tensor),
            loads=(NO_HEAD, BY_NAME),
            or_refused=True,
            rewrites=(NATIVE,) if tensor.shape in BASE_SHAPES else (),
        )
    name = f"base_model.model.{HEAD}.modules_to_save.default.weight"
    own = tuple((door, "it is the adapter's own, which is replaced as a whole") for door in (PEFT, HOTSWAP))
    yield Case(
        "the head of another adapter in the file", added(name, torch.zeros(3, 32)), loads=(NO_HEAD, BY_NAME, *own)
    )


def _without_masks(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if name.endswith("peft_mask_bits"):
            del tensors[name]


def _twice(tensors: dict[str, Tensor]) -> None:
    tensors[key_of(QUERY).removeprefix("base_model.model.")] = tensors[key_of(QUERY)].clone()


# ---- records ----


def _records() -> Iterator[Case]:
    for codec in ("gaps", "bits", "ranks"):
        for case in _records_of(codec):
            yield Case(f"{codec}: {case.name}", case.change, codec, case.loads, case.raises)
    first, second = key_of(QUERY), key_of(KEY)
    yield Case(
        "masks of two modules swapped",
        lambda f: edit_tensors(f, lambda t: t.update({first: t[second].clone(), second: t[first].clone()})),
        loads=(NO_BASE,),
    )
    yield Case("adapter of another base", lambda folder: save_adapter(folder, base_seed=5), loads=(NO_BASE,))
    for codec in ("bits", "ranks"):
        yield Case(
            f"adapter of another base, {codec}",
            lambda folder, codec=codec: save_adapter(folder, codec, base_seed=5),
            loads=(NO_BASE,) if codec == "bits" else (),
        )
    for what, record in _forged().items():
        yield Case(f"forged: {what}", lambda f, record=record: edit_record(f, QUERY, lambda _: record, sealed=False))
    yield Case("forged: 100 masks of 2 GiB each", _many_claims, loads=(UNASKED,))


def _records_of(codec: str) -> Iterator[Case]:
    def at(change: Callable[[bytes], bytes], sealed: bool = True, module: str = PADDED) -> Change:
        return lambda folder: edit_record(folder, module, change, sealed)

    unread = (NO_BASE,) if codec != "ranks" else ()
    for length in (0, 1, 4, 7, 8, 16, 24, 55, 56, 57):
        yield Case(f"record cut after {length} bytes", at(lambda data, n=length: data[:n], sealed=False))
        yield Case(f"record cut after {length} bytes, sealed", at(lambda data, n=length: data[:n] + bytes(4)))
    yield Case("record longer by a zero, sealed", at(lambda data: data[:-4] + bytes(5)))
    yield Case("record twice", at(lambda data: data + data, sealed=False))
    for offset in (0, 4, 5, 6, 7, 8, 12, 16, 23, 24, 40, 56, 58, -6, -5, -4, -1):
        where = f"byte {offset}" if offset >= 0 else f"byte {-offset} from the end"
        flip = lambda data, at=offset: flipped(at % len(data), 2)(data)  # noqa: E731
        yield Case(f"bit flipped in {where}", at(flip, sealed=False))
    for what, offset, new in (
        ("version 0", 4, b"\0"),
        ("version 2", 4, b"\2"),
        ("version 255", 4, b"\xff"),
        ("codec 3", 5, b"\3"),
        ("no dimensions", 6, b"\0"),
        ("9 dimensions", 6, b"\t"),
        ("255 dimensions", 6, b"\xff"),
        ("precision 11", 7, b"\x0b"),
        ("another shape", 8, struct.pack("<2I", 159, 32)),
        ("a shape of 2^64 weights", 8, struct.pack("<2I", 2**32 - 1, 2**32 - 1)),
        ("no rows", 8, bytes(4)),
        ("a zero more", 16, b""),
        ("no zeros", 16, bytes(8)),
        ("2^64 - 1 zeros", 16, b"\xff" * 8),
        ("a fingerprint of NaN", 24, struct.pack("<16e", *[float("nan")] * 16)),
        ("a fingerprint of infinity", 24, struct.pack("<16e", *[float("inf")] * 16)),
    ):
        if what == "a zero more":
            change = lambda data: patched(16, struct.pack("<Q", struct.unpack_from("<Q", data, 16)[0] + 1))(data)  # noqa: E731
        else:
            change = patched(offset, new)
        unseen = unread if what == "another shape" and codec == "gaps" else ()
        yield Case(f"{what}, sealed", at(change), loads=unseen)
    for other in {0, 1, 2} - {{"bits": 0, "gaps": 1, "ranks": 2}[codec]}:
        yield Case(f"read as codec {other}, sealed", at(patched(5, bytes([other]))))
    for what, fill in (("zeros", b"\0"), ("ones", b"\xff"), ("0x55", b"\x55")):
        yield Case(f"payload of {what}, sealed", at(lambda data, fill=fill: data[:56] + fill * (len(data) - 56)))
    yield Case("payload of 1 MB, sealed", at(lambda data: data[:56] + b"\xff" * (1 << 20)))
    yield Case("padding bit set, sealed", at(_last_payload_bit))
    for dtype in (torch.int8, torch.float32, torch.int64, torch.bool):
        cast = () if dtype == torch.bool else ((NATIVE, "transformers casts it back to bytes, which are checked"),)
        yield Case(f"record as {dtype}", lambda f, dtype=dtype: edit_tensors(f, lambda t: _cast(t, dtype)), loads=cast)
    yield Case(
        "record of two dimensions",
        lambda f: edit_tensors(f, lambda t: t.update({key_of(QUERY): t[key_of(QUERY)][None]})),
        raises=((NATIVE, RuntimeError),),
    )
    yield Case(
        "fingerprint of another weight, sealed",
        at(patched(24, struct.pack("<16e", *[1.0] * 16))),
        loads=unread,
    )


def _last_payload_bit(data: bytes) -> bytes:
    return (
        patched(len(data) - 5, bytes([data[-5] | 0x80]))(data) if data[-5] < 0x80 else flipped(len(data) - 5, 7)(data)
    )


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors[key_of(QUERY)] = tensors[key_of(QUERY)].to(dtype)


def _forged() -> dict[str, bytes]:
    return {
        "2^256 weights": claim((2**32 - 1,) * 8, 0),
        "2^64 weights in no rows": claim((0, 2**32 - 1, 2**32 - 1), 0),
        "2^40 weights": claim((2**20, 2**20), 0),
        "2^34 weights, all off": claim((2**17, 2**17), 2**34),
        "2^34 weights, half of them coded in nothing": claim((2**17, 2**17), 2**33),
        "2^34 weights, one gap that never ends": claim((2**17, 2**17), 1, bytes(1 << 16)),
        "gaps that never end": claim((32, 32), 16, bytes(100)),
        "gaps past the end": claim((32, 32), 3, b"\x07\xff\xff"),
        "gaps that are too few": claim((32, 32), 64, b"\xff" * 3),
        "a width of 60": claim((32, 32), 1, bytes(14) + b"\xff"),
        "bits of another shape": claim((32, 33), 0, bytes(160), codec=0),
        "an empty record": b"",
        "eight bytes": b"PMSK\1\1\2\0",
    }


def _many_claims(folder: Path) -> None:
    bomb = as_tensor(claim((2**17, 2**17), 0))
    edit_tensors(folder, lambda tensors: tensors.update({key_of(f"bert.bomb{i}"): bomb.clone() for i in range(100)}))


# ---- heads ----


def _heads() -> Iterator[Case]:
    def head(change: Callable[[Tensor], Tensor]) -> Change:
        name = f"base_model.model.{HEAD}.weight"
        return lambda folder: edit_tensors(folder, lambda t: t.update({name: change(t[name]).contiguous()}))

    values = (NATIVE, "a head is a head; it can compute nonsense with finite weights as well")
    yield Case("NaN in the task head", head(lambda w: w * float("nan")), loads=(NO_HEAD, values))
    yield Case("head of another shape", head(lambda w: w[:2]), loads=(NO_HEAD,), raises=_mismatched())
    yield Case("head of no rows", head(lambda w: w[:0]), loads=(NO_HEAD,), raises=_mismatched())
    yield Case("head of 100 MB", head(lambda w: w.new_zeros(25_000_000)), loads=(NO_HEAD,), raises=_mismatched())
    cast = (NATIVE, "transformers casts it")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        yield Case(f"head as {dtype}", head(lambda w, dtype=dtype: w.to(dtype)), loads=(NO_HEAD, cast))
    yield Case(
        "head missing",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(f"base_model.model.{HEAD}.weight")),
        loads=(NO_HEAD,),
        raises=tuple((door, KeyError) for door in (PEFT, SECOND)),
    )


def _mismatched() -> tuple[tuple[str, Raised], ...]:
    return tuple((door, RuntimeError) for door in (PEFT, SECOND, NATIVE))


# ---- adapter_config.json ----


def _configurations() -> Iterator[Case]:
    def text(content: str | bytes) -> Change:
        data = content.encode() if isinstance(content, str) else content
        return lambda folder: (folder / CONFIG).write_bytes(data)

    def fields(**values: Any) -> Change:
        return lambda folder: edit_config(folder, **values)

    for what, content in {
        "empty": "",
        "not JSON": "{target_modules: query}",
        "not UTF-8": b'{"peft_type": "\xff"}',
        "cut": '{"peft_type": "PEFT_MASK", "targ',
        "a number too long": '{"peft_type": "PEFT_MASK", "seed": ' + "1" * 10_000 + "}",
    }.items():
        yield Case(f"configuration {what}", text(content))
    deep = "[" * 100_000 + "]" * 100_000
    yield Case(
        "configuration nested 100,000 deep",
        text('{"peft_type": "PEFT_MASK", "auto_mapping": ' + deep + "}"),
        raises=tuple((door, RecursionError) for door in (PEFT, SECOND, NATIVE, HOTSWAP)),
    )
    for content in ("[]", "3", "null", '"PEFT_MASK"'):
        yield Case(
            f"configuration is {content}",
            text(content),
            raises=tuple((door, TypeError) for door in (PEFT, SECOND, NATIVE, HOTSWAP)),
        )
    unknown = tuple((door, KeyError) for door in (PEFT, SECOND, NATIVE, HOTSWAP))
    yield Case("method unknown", fields(peft_type="UNKNOWN"), loads=(NO_CONFIG,), raises=unknown)
    yield Case("method missing", lambda folder: (folder / CONFIG).write_text("{}"), loads=(NO_CONFIG,), raises=unknown)
    unhashable = tuple((door, TypeError) for door in (PEFT, SECOND, NATIVE, HOTSWAP))
    yield Case("method is a list", fields(peft_type=["PEFT_MASK"]), loads=(NO_CONFIG,), raises=unhashable)
    for size in (2**31, 2**40, 10**30):
        unasked = tuple((door, "this door needs no lengths") for door in (PEFT, SECOND, HOTSWAP, MASKS))
        yield Case(f"records of {size:,} bytes claimed", fields(record_bytes=[size] * 6), loads=unasked)


# values that are of a wrong type for most fields, or out of range
HOSTILE = (True, -1, 10**30, 1.5, float("nan"), "", "x", [], [[]], ["x", -1], {}, {"x": [-1]})


def hostile_fields() -> list[Case]:
    """Every field of the configuration with every hostile value, which may mean something or must be refused."""
    anything = tuple((door, "the value means something, or nothing") for door in DOORS)

    def change(name: str, value: Any) -> Change:
        return lambda folder: edit_config(folder, **{name: value})

    raises = {
        "peft_type": tuple((door, (KeyError, TypeError)) for door in (PEFT, SECOND, NATIVE, HOTSWAP)),
        "trainable_token_indices": tuple((door, KeyError) for door in (PEFT, SECOND)),  # a tensor missing in the file
    }
    names = [field.name for field in dataclasses.fields(MaskConfig)]
    return [
        Case(f"{name} = {value!r}", change(name, value), "gaps", anything, raises.get(name, ()), or_refused=True)
        for name in names
        for value in HOSTILE
    ]


# ---- what else is in the folder ----


def _folders() -> Iterator[Case]:
    yield Case("a directory in place of the file", _directory_in_place)
    yield Case("a link to nothing", lambda f: _link(f, f / "nothing"))
    yield Case("a link to a file that is no adapter", lambda f: _link(f, Path(__file__)))
    yield Case("a link to itself", lambda f: _link(f, f / WEIGHTS))
    yield Case("a link to /dev/zero", lambda f: _link(f, Path("/dev/zero")))


def _directory_in_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _link(folder: Path, target: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(target)
