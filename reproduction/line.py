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
from reproduction.seeds import bars, over_seeds

TITLE = "Line segments between minima: SST-2, development accuracy"
NOTE = (
    "All tensors are interpolated. The pretrained model has the head that both trainings started from; with a trained "
    "head it has that of the other end, so that only the encoder moves. Barrier: how far the accuracy falls below the "
    "straight line between the ends, at worst. Spread: highest less lowest accuracy, 0 if the segment is flat. Both "
    "for each seed."
)


def ends(models: Models, seed: int) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A plain model to write weights into, and those of the pretrained, the fine-tuned and the masked model."""
    plain = models.untrained("sst2", "full", seed)
    return plain, {
        "pretrained": effective_weights(plain),
        "fine-tuned": effective_weights(models.trained("sst2", "full", seed)),
        "masked": effective_weights(models.trained("sst2", "mask", seed)),
    }


def run(models: Models, scale: Scale) -> dict[str, Any]:
    dev = models.batches("sst2", "dev", scale.rows)
    scans: dict[str, list[list[dict[str, float]]]] = {}
    for seed in scale.seeds:
        plain, weights = ends(models, seed)
        for name, (start, end) in _segments(weights).items():
            found = scan(plain, Curve(start, end), lambda model: accuracy(model, dev), scale.points)
            scans.setdefault(name, []).append(found)
    rows = [
        {
            "segment": name,
            "t": round(points[0]["t"], 3),
            **over_seeds("accuracy", [point["score"] for point in points]),
        }
        for name, of_seeds in scans.items()
        for points in zip(*of_seeds, strict=True)
    ]
    return {
        "rows": rows,
        "seeds": len(scale.seeds),
        "barriers": {name: [round(barrier(found), 4) for found in of_seeds] for name, of_seeds in scans.items()},
        "spreads": {name: [_spread(found) for found in of_seeds] for name, of_seeds in scans.items()},
        "examples": sum(len(batch["labels"]) for batch in dev),
    }


def _segments(weights: dict[str, dict[str, Tensor]]) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return {
        "fine-tuned to masked": (weights["fine-tuned"], weights["masked"]),
        "pretrained to fine-tuned": (weights["pretrained"], weights["fine-tuned"]),
        "pretrained to masked": (weights["pretrained"], weights["masked"]),
        "pretrained with the trained head to fine-tuned": (_with_head(weights, "fine-tuned"), weights["fine-tuned"]),
        "pretrained with the trained head to masked": (_with_head(weights, "masked"), weights["masked"]),
    }


def _spread(found: list[dict[str, float]]) -> float:
    scores = [row["score"] for row in found]
    return round(max(scores) - min(scores), 4)


def _with_head(weights: dict[str, dict[str, Tensor]], of: str) -> dict[str, Tensor]:
    return {name: weights[of if in_head(name) else "pretrained"][name] for name in weights["pretrained"]}


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for name in result["barriers"]:
        rows = [row for row in result["rows"] if row["segment"] == name]
        accuracies = [row["accuracy"] for row in rows]
        lines[name] = Line([row["t"] for row in rows], accuracies, "pretrained" in name, bars(rows))
    plot_lines(path, lines, "t", "accuracy", TITLE)
