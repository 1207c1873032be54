"""`peft-mask inspect`: what an adapter is, from its files alone."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from peft_mask.cli.adapter import CODEC_NAMES, Adapter, Matrix, read_adapter
from peft_mask.cli.answer import Answer, columns, facts, percent, plain, size

_LEARNED = (
    "binarizer",
    "pattern",
    "target_sparsity",
    "target_bytes",
    "candidates",
    "candidate_rule",
    "structure",
    "head",
    "scores_dtype",
    "seed",
)
_BAR = 24  # characters of the longest bar


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "inspect",
        help="what an adapter is: base, sparsity by layer, bytes",
        description="Say what an adapter is, from its files alone: no base model is needed, and nothing is run.",
        epilog="examples:\n  peft-mask inspect runs/trec\n  peft-mask inspect runs/trec --matrices\n"
        "  peft-mask inspect user/adapter@main --json",
    )
    one.add_argument("adapter", metavar="ADAPTER", help="a folder, or an id on the Hub")
    one.add_argument("--matrices", action="store_true", help="a line for each matrix as well")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Inspect an adapter."""
    adapter = read_adapter(options.adapter)
    data = described(adapter)
    tables = {
        "by kind of matrix": _lines(data["by_kind"], "kind"),
        "by layer": _lines(data["by_layer"], "layer"),
    }
    if options.matrices:
        tables["by matrix"] = _lines(data["matrices"], "name")
    if adapter.beside:
        rows = [
            {"tensor": name, "shape": "x".join(map(str, shape)), "dtype": dtype, "bytes": held}
            for name, (dtype, shape, held) in adapter.beside.items()
        ]
        tables["trained beside the masks"] = columns(rows)
    return Answer(data, "\n\n".join([summary(adapter), *(f"{name}\n{table}" for name, table in tables.items())]))


def described(adapter: Adapter) -> dict[str, Any]:
    """Return all that `inspect --json` says of an adapter."""
    codecs = Counter(CODEC_NAMES[mask.header.codec] for mask in adapter.masks)
    said = adapter.config
    return {
        "adapter": adapter.name,
        "method": said.get("peft_type"),
        "base_model": said.get("base_model_name_or_path"),
        "task_type": said.get("task_type"),
        "learned_with": {name: said[name] for name in _LEARNED if said.get(name) is not None},
        "format_version": adapter.format_version,
        "portable": adapter.portable,
        "masks": len(adapter.masks),
        "weights": adapter.weights,
        "zeros": adapter.zeros,
        "sparsity": adapter.zeros / max(adapter.weights, 1),
        "bits_per_weight": 8 * adapter.mask_bytes / max(adapter.weights, 1),
        "bytes": {
            "masks": adapter.mask_bytes,
            "beside": sum(held for _, _, held in adapter.beside.values()),
            "scores": adapter.scores,
            "file": adapter.file_bytes,
        },
        "coded_as": dict(codecs),
        "by_kind": grouped(adapter.masks, lambda mask: kind_of(mask.name), "kind"),
        "by_layer": grouped(adapter.masks, lambda mask: layer_of(mask.name), "layer"),
        "matrices": [
            {"name": mask.name, "shape": list(mask.header.shape), "coded_as": CODEC_NAMES[mask.header.codec]}
            | _counted([mask])
            for mask in adapter.masks
        ],
        "beside": [
            {"name": name, "dtype": dtype, "shape": list(shape), "bytes": held}
            for name, (dtype, shape, held) in adapter.beside.items()
        ],
    }


def summary(adapter: Adapter) -> str:
    """Return the first lines for people."""
    data = described(adapter)
    learned = ", ".join(f"{name} {value}" for name, value in data["learned_with"].items())
    beside = data["bytes"]["beside"]
    how = ", ".join(f"{count} as {name}" for name, count in data["coded_as"].items())
    return facts(
        {
            "adapter": adapter.name,
            "method": "peft-mask (PEFT_MASK)",
            "base model": data["base_model"] or "not named",
            "task": data["task_type"] or "none named",
            "learned with": learned or None,
            "format": f"version {data['format_version']}, "
            + ("portable: read without its base" if data["portable"] else "read with its base weights alone"),
            "masks": f"{data['masks']} of {data['weights']:,} weights, {how}",
            "switched off": f"{data['zeros']:,} weights, {percent(data['sparsity'])}",
            "size": f"{adapter.mask_bytes:,} bytes of masks, {data['bits_per_weight']:.3f} bits a weight",
            "beside": f"{beside:,} bytes of {len(adapter.beside)} tensors trained whole" if beside else "nothing",
            "scores": f"{adapter.scores:,} bytes, to resume training from" if adapter.scores else None,
            "file": f"{adapter.file_bytes:,} bytes ({size(adapter.file_bytes)})",
        }
    )


def layer_of(name: str) -> str:
    """Return the number of the layer that a module is in, the first in its name; "-" if there is none.

    >>> layer_of("bert.encoder.layer.3.output.dense"), layer_of("classifier")
    ('3', '-')
    """
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return number[1] if number else "-"


def kind_of(name: str) -> str:
    """Return what kind of matrix a module holds: its name behind the number of the layer, other numbers as "*".

    >>> kind_of("bert.encoder.layer.3.output.dense"), kind_of("layers.0.experts.7.up_proj"), kind_of("pooler.dense")
    ('output.dense', 'experts.*.up_proj', 'pooler.dense')
    """
    behind = re.sub(r"^.*?(?:^|\.)\d+\.", "", name, count=1)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", behind)


def grouped(masks: Iterable[Matrix], by: Callable[[Matrix], str], head: str) -> list[dict[str, Any]]:
    """Return a row for each group of masks, in the order they appear."""
    groups: dict[str, list[Matrix]] = {}
    for mask in masks:
        groups.setdefault(by(mask), []).append(mask)
    order = list(groups)
    if all(name.isdigit() or name == "-" for name in order):
        order.sort(key=lambda name: (name == "-", int(name) if name.isdigit() else 0))
    return [{head: name, "matrices": len(groups[name])} | _counted(groups[name]) for name in order]


def _counted(masks: list[Matrix]) -> dict[str, Any]:
    weights, zeros = sum(mask.weights for mask in masks), sum(mask.header.zeros for mask in masks)
    held = sum(mask.bytes for mask in masks)
    return {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / max(weights, 1),
        "bytes": held,
        "bits_per_weight": 8 * held / max(weights, 1),
    }


def _lines(rows: list[dict[str, Any]], head: str) -> str:
    most = max((row["sparsity"] for row in rows), default=0) or 1
    return columns(
        [
            {
                head: plain(row[head]),
                "weights": row["weights"],
                "off": row["zeros"],
                "sparsity": percent(row["sparsity"]),
                "bytes": row["bytes"],
                "bits a weight": f"{row['bits_per_weight']:.3f}",
                "": "#" * round(_BAR * row["sparsity"] / most),
            }
            for row in rows
        ]
    )
