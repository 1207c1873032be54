"""Adapters -> the numbers of a report: where zeros lie, how adapters agree, what a training has logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.cli.adapter import Adapter
from peft_mask.cli.answer import plain
from peft_mask.cli.diff import agreement
from peft_mask.cli.inspect import kind_of, layer_of
from peft_mask.format.mask_file import weight_of
from peft_mask.format.masks import Masks

BINS = 16  # of rows, and of columns, in the picture of a matrix
CLASSES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)  # of weights by magnitude: ends, as shares of a matrix
_CURVES, _POINTS = 24, 400  # the most that is drawn
_LARGEST_LOG = 32 << 20  # bytes of a trainer_state.json that is read
_LOGGED = {
    "sparsity": "Share of the weights that are off",
    "flip_ratio": "Share of the weights whose mask has changed since the start",
    "bits_per_weight": "Bits of the mask for each masked weight",
    "grad_norm": "Norm of the gradient",
    "learning_rate": "Learning rate of what is trained beside the mask",
    "loss": "Loss on the training rows",
}
_MEASURED = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "perplexity": "Perplexity",
    "runtime": "Seconds of an evaluation",
    "samples_per_second": "Rows a second",
    "steps_per_second": "Batches a second",
}
_NO_CURVES = ("step", "epoch", "total_flos")  # what stands in each row, or only grows


def positions(masks: Masks) -> list[dict[str, Any]]:
    """Count zeros by their place in the matrix, for each kind of matrix.

    Returns:
        A row a cell: `kind`, `row` and `column`, from 0 to `BINS` - 1 along the matrix, and `ratio`, how many times as
        many weights are off there as in the matrices as a whole.
    """
    zeros: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, mask in _matrices(masks):
        kind, rows, columns = kind_of(name), *mask.shape
        down, across = min(BINS, rows), min(BINS, columns)
        found = (~mask).nonzero()
        cells = found[:, 0] * down // rows * across + found[:, 1] * across // columns
        key = f"{kind}\n{down}\n{across}"
        counted = torch.bincount(cells, minlength=down * across).view(down, across)
        held = torch.outer(_lengths(rows, down), _lengths(columns, across))
        zeros[key] = zeros.get(key, torch.zeros_like(counted)) + counted
        weights[key] = weights.get(key, torch.zeros_like(held)) + held
    made = []
    for key, counted in zeros.items():
        share = counted.sum() / weights[key].sum()
        ratio = counted / weights[key] / share.clamp(min=1e-12)
        for row in range(ratio.shape[0]):
            for column in range(ratio.shape[1]):
                value = float(ratio[row, column])
                made.append({"kind": key.partition("\n")[0], "row": row, "column": column, "ratio": value})
    return made


def crowding(masks: Masks) -> list[dict[str, Any]]:
    """Measure how unevenly zeros are spread over the rows and columns of each matrix.

    Returns:
        A row a matrix: `name`, `kind`, `layer`; `rows` and `columns`, the share of its zeros in the tenth of its rows
        (columns) that has most; `rows_at_random` and `columns_at_random`, the same of as many zeros drawn at random.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, mask in _matrices(masks):
        zeros = int((~mask).sum())
        if not zeros:
            continue
        row: dict[str, Any] = {"name": name, "kind": kind_of(name), "layer": layer_of(name)}
        drawn = torch.randint(mask.numel(), (zeros,), generator=generator)
        for words, dimension, places in (("rows", 1, drawn // mask.shape[1]), ("columns", 0, drawn % mask.shape[1])):
            counts = (~mask).sum(dimension)
            row[words] = _busiest(counts)
            row[f"{words}_at_random"] = _busiest(torch.bincount(places, minlength=len(counts)))
        made.append(row)
    return made


def magnitudes(masks: Masks, base: nn.Module) -> list[dict[str, Any]]:
    """Count zeros by the magnitude of their weights.

    Args:
        masks: of the base.
        base: a model with values.

    Returns:
        A row for each kind of matrix and class of its weights, the smallest first: `kind`, `weights`, which shares of
        the matrix by magnitude these are, and `share` of the zeros of that kind.
    """
    counts: dict[str, Tensor] = {}
    for name, mask in masks.items():
        weight = weight_of(name, base, mask.shape).detach().float().abs().flatten()
        order = weight.argsort(stable=True)
        off = ~mask.flatten()[order]
        ends = torch.tensor([math.ceil(end * len(off)) for end in CLASSES])
        classes = torch.searchsorted(ends, off.nonzero().flatten(), right=True)
        found = torch.bincount(classes, minlength=len(CLASSES))
        counts[kind_of(name)] = counts.get(kind_of(name), torch.zeros_like(found)) + found
    return [
        {"kind": kind, "weights": _class(place), "share": float(count / found.sum().clamp(min=1))}
        for kind, found in counts.items()
        for place, count in enumerate(found)
    ]


def agreements(masks: Mapping[str, Masks]) -> list[dict[str, Any]]:
    """Compare every two adapters.

    Args:
        masks: by name of the adapter.

    Returns:
        A row a pair, both ways round and each with itself: `a`, `b` and `agreement`, the Jaccard index of what is off;
        NaN where they cannot be compared.
    """
    names = list(masks)
    found: dict[tuple[str, str], float] = {}
    for place, a in enumerate(names):
        for b in names[place:]:
            try:
                value = agreement(masks[a], masks[b], lambda name: "all").get("all", {}).get("agreement", math.nan)
            except ValueError:
                value = math.nan
            found[a, b] = found[b, a] = value
    return [{"a": a, "b": b, "agreement": found[a, b]} for a in names for b in names]


def agreements_by_layer(masks: Mapping[str, Masks]) -> list[dict[str, Any]]:
    """Compare every two adapters layer by layer: a row each, with `pair`, `layer` and `agreement`."""
    names, rows = list(masks), []
    for place, a in enumerate(names):
        for b in names[place + 1 :]:
            try:
                found = agreement(masks[a], masks[b], layer_of)
            except ValueError:
                continue
            pair = f"{a} and {b}"
            rows += [{"pair": pair, "layer": layer, "agreement": row["agreement"]} for layer, row in found.items()]
    return rows


def curves(adapter: Adapter) -> dict[str, list[tuple[float, float]]]:
    """Return what a training has logged, by name: steps and values. Nothing if the folder holds no log.

    It is `trainer_state.json` of transformers' Trainer, in the folder or in its last checkpoint.
    """
    for path in (adapter.folder / "trainer_state.json", *_checkpoints(adapter.folder)):
        if path.is_file() and path.stat().st_size <= _LARGEST_LOG:
            return _logged(path)
    return {}


def curve_name(key: str) -> str:
    """Return what a key of a log means in words; the key itself if it is none that is known.

    >>> curve_name("sparsity"), curve_name("eval_accuracy"), curve_name("my_loss")
    ('Share of the weights that are off', 'Accuracy on the validation rows', 'my_loss')
    """
    if not key.startswith("eval_"):
        return _LOGGED.get(key, key)
    name = _MEASURED.get(key.removeprefix("eval_"))
    return f"{name} on the validation rows" if name else key


def _logged(path: Path) -> dict[str, list[tuple[float, float]]]:
    try:
        state = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return {}
    history = state.get("log_history") if isinstance(state, dict) else None
    found: dict[str, list[tuple[float, float]]] = {}
    for row in history if isinstance(history, list) else []:
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            continue
        for name, value in row.items():
            if name not in _NO_CURVES and _is_number(value):
                found.setdefault(plain(name)[:80], []).append((float(row["step"]), float(value)))
    drawn = {name: sorted(found[name]) for name in sorted(found, key=_rank) if len(found[name]) > 1}
    return {name: _thinned(points) for name, points in [*drawn.items()][:_CURVES]}


def _rank(name: str) -> tuple[bool, bool, str]:
    """What is looked at first: losses, then what was evaluated, then the rest."""
    return not name.endswith("loss"), not name.startswith("eval_"), name


def _checkpoints(folder: Path) -> list[Path]:
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    return sorted(states, key=lambda path: -int(path.parent.name[11:]))


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = math.ceil(len(points) / _POINTS)
    return points[::step] if points[-1] in points[::step] else [*points[::step], points[-1]]


def _is_number(value: object) -> bool:
    """Whether it can be drawn; integers that no float can hold, which JSON allows, cannot."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _matrices(masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """Masks of more than one dimension, as matrices: of a convolution a row an output."""
    for name, mask in masks.items():
        if mask.dim() > 1 and mask.numel():
            yield name, mask.reshape(mask.shape[0], -1)


def _class(place: int) -> str:
    start = CLASSES[place - 1] if place else 0.0
    return f"{100 * start:g}-{100 * CLASSES[place]:g} %"


def _lengths(size: int, bins: int) -> Tensor:
    return torch.bincount(torch.arange(size) * bins // size, minlength=bins).double()


def _busiest(counts: Tensor) -> float:
    most = counts.sort(descending=True).values[: math.ceil(len(counts) / 10)]
    return float(most.sum() / counts.sum().clamp(min=1))
