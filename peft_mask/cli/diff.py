"""`peft-mask diff`: how far two adapters agree."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peft_mask.cli.adapter import Adapter, read_adapter
from peft_mask.cli.answer import NO, OK, Answer, columns, facts, one_line, percent, plain
from peft_mask.cli.base import add_base, base_for_masks, masks_of
from peft_mask.cli.inspect import kind_of, layer_of
from peft_mask.format.masks import Masks
from peft_mask.model.names import module_name
from peft_mask.serving.source import TENSORS

_BY = ("kind", "layer", "matrix")


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "diff",
        help="how far two adapters agree; exit code 1 if they differ",
        description="Compare the masks of two adapters of one base, and what each has trained beside them. Agreement\n"
        "is the Jaccard index of what is off: |off in both| / |off in one or both|, 1 for the same masks.",
        epilog="examples:\n  peft-mask diff runs/a runs/b\n  peft-mask diff runs/a runs/b --by matrix --json\n\n"
        "exit codes: 0 the same masks and tensors, 1 different, 2 not compared",
    )
    one.add_argument("first", metavar="A", help="an adapter")
    one.add_argument("second", metavar="B", help="another one")
    one.add_argument("--by", choices=_BY, default="kind", help="what a line is for")
    add_base(one, required=False, why=", for adapters that are not portable")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Compare two adapters."""
    first, second = read_adapter(options.first), read_adapter(options.second)
    base = base_for_masks(options, first)
    a, b = (masks_of(each, base) for each in (first, second))
    if a.keys() != b.keys():
        return _other_modules(options, a, b)
    groups = {"kind": kind_of, "layer": layer_of, "matrix": str}
    try:
        rows, whole = agreement(a, b, groups[options.by]), agreement(a, b, lambda name: "all")["all"]
    except ValueError as error:  # other shapes or other base weights
        data = {"a": options.first, "b": options.second, "same": False, "not_compared_because": one_line(error)}
        return Answer(data, f"They differ: {one_line(error)}", NO)
    beside = _beside(first, second)
    same = not any(row["only_in_a"] or row["only_in_b"] for row in rows.values()) and not beside
    data = {
        "a": options.first,
        "b": options.second,
        "same": same,
        "all": whole,
        "by": options.by,
        "groups": [{options.by: name} | row for name, row in rows.items()],
        "beside": beside,
    }
    table = [_line(options.by, name, row) for name, row in [*rows.items(), ("all", whole)]]
    text = columns(table)
    if beside:
        text += "\n\ntrained beside the masks\n" + facts(beside)
    text += "\n\nThe same masks and tensors." if same else "\n\nThey differ."
    return Answer(data, text, OK if same else NO)


def agreement(a: Masks, b: Masks, by: Any) -> dict[str, dict[str, Any]]:
    """Count, for each group of masks, what is off in both and in one alone, and their Jaccard index.

    Args:
        a: masks.
        b: masks of the same modules and the same base.
        by: from the name of a module to that of its group.

    Raises:
        ValueError: they are of different modules, shapes or base weights.
    """
    union, one, other = (a & b).zeros, a.zeros, b.zeros
    counts: dict[str, list[int]] = {}
    for name, off in union.items():
        row = counts.setdefault(by(name), [0, 0, 0])
        for place, found in enumerate((one[name] + other[name] - off, off - other[name], off - one[name])):
            row[place] += found
    return {
        name: {
            "agreement": both / (both + left + right) if both + left + right else math.nan,
            "off_in_both": both,
            "only_in_a": left,
            "only_in_b": right,
        }
        for name, (both, left, right) in counts.items()
    }


def _line(head: str, name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        head: plain(name),
        "agreement": percent(row["agreement"]),
        "off in both": row["off_in_both"],
        "only in A": row["only_in_a"],
        "only in B": row["only_in_b"],
    }


def _other_modules(options: argparse.Namespace, a: Masks, b: Masks) -> Answer:
    """Masks of different modules differ, and nothing more can be said of their zeros."""
    left, right = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    data = {"a": options.first, "b": options.second, "same": False, "masked_only_in_a": left, "masked_only_in_b": right}
    lines = [
        f"They differ: they do not mask the same modules ({len(a.keys() & b.keys())} are masked in both).",
        *(f"  only in A: {plain(name)}" for name in left),
        *(f"  only in B: {plain(name)}" for name in right),
    ]
    return Answer(data, "\n".join(lines), NO)


def _beside(first: Adapter, second: Adapter) -> dict[str, str]:
    """What differs of the tensors beside the masks, by name."""
    found: dict[str, str] = {}
    a, b = _tensors(first), _tensors(second)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found[name] = "only in A" if name in a else "only in B"
        elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            found[name] = f"{_kind(a[name])} in A, {_kind(b[name])} in B"
        elif not torch.equal(a[name], b[name]):
            apart = (a[name].double() - b[name].double()).abs().max()
            found[name] = f"differs by up to {float(apart):.3g}"
    return found


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    with safe_open(adapter.folder / TENSORS, framework="pt") as file:
        names = {module_name(key): key for key in file.keys()}  # noqa: SIM118
        return {name: file.get_tensor(names[name]) for name in adapter.beside}


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
