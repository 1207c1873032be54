"""Is the segment between the fine-tuned and the masked minimum flat, and those from the pretrained model are not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.accuracy.sizes import in_head
from peft_mask.analysis import Curve, accuracy, barrier, effective_weights, scan
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Line segments between minima: SST-2, development accuracy"
NOTE = (
    "All tensors are interpolated. The pretrained model has the head that both trainings started from; with a trained "
    "head it has that of the other end, so that only the encoder moves. Barrier: how far the accuracy falls below the "
    "straight line between the ends, at worst. Spread: highest less lowest accuracy, 0 if the segment is flat."
)


def ends(models: Models) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A plain model to write weights into, and those of the pretrained, the fine-tuned and the masked model."""
    plain = models.untrained("sst2", "full", 0)
    return plain, {
        "pretrained": effective_weights(plain),
        "fine-tuned": effective_weights(models.trained("sst2", "full", 0)),
        "masked": effective_weights(models.trained("sst2", "mask", 0)),
    }


def run(models: Models, scale: Scale) -> dict[str, Any]:
    plain, weights = ends(models)
    dev = models.batches("sst2", "dev", scale.rows)
    segments = {
        "fine-tuned to masked": (weights["fine-tuned"], weights["masked"]),
        "pretrained to fine-tuned": (weights["pretrained"], weights["fine-tuned"]),
        "pretrained to masked": (weights["pretrained"], weights["masked"]),
        "pretrained with the trained head to fine-tuned": (_with_head(weights, "fine-tuned"), weights["fine-tuned"]),
        "pretrained with the trained head to masked": (_with_head(weights, "masked"), weights["masked"]),
    }
    rows, barriers, spreads = [], {}, {}
    for name, (start, end) in segments.items():
        found = scan(plain, Curve(start, end), lambda model: accuracy(model, dev), scale.points)
        barriers[name] = round(barrier(found), 4)
        spreads[name] = round(max(row["score"] for row in found) - min(row["score"] for row in found), 4)
        rows += [{"segment": name, "t": round(row["t"], 3), "accuracy": round(row["score"], 4)} for row in found]
    return {
        "rows": rows,
        "barriers": barriers,
        "spreads": spreads,
        "examples": sum(len(batch["labels"]) for batch in dev),
    }


def _with_head(weights: dict[str, dict[str, Tensor]], of: str) -> dict[str, Tensor]:
    return {name: weights[of if in_head(name) else "pretrained"][name] for name in weights["pretrained"]}


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for name in result["barriers"]:
        rows = [row for row in result["rows"] if row["segment"] == name]
        lines[name] = Line([row["t"] for row in rows], [row["accuracy"] for row in rows], dashed="pretrained" in name)
    plot_lines(path, lines, "t", "accuracy", TITLE)
