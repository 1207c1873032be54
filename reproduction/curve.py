"""A Bezier curve with three bends between the fine-tuned and the masked minimum, beside the segment."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.tasks import TASKS, training_batches
from peft_mask.analysis import Curve, accuracy, barrier, scan, train_curve
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.line import ends
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.seeds import bars, over_seeds

TITLE = "A curve with three bends between minima: SST-2, development accuracy"
NOTE = (
    "The bends are trained with Adam, one random point of the curve a batch of 32. Barriers and losses for each seed."
)
BENDS, LR = 3, 1e-4


def run(models: Models, scale: Scale) -> dict[str, Any]:
    train_rows, dev = models.setting.rows(TASKS["sst2"], "train"), models.batches("sst2", "dev", scale.rows)
    scans, losses = [], []
    for seed in scale.seeds:
        plain, weights = ends(models, seed)
        indices = training_batches(train_rows, seed, scale.curve_steps, models.setting.batch_size)
        curve = Curve(weights["fine-tuned"], weights["masked"], BENDS)
        found = train_curve(plain.eval(), curve, (train_rows.batch(batch) for batch in indices), LR)
        losses.append([round(mean(part), 4) for part in (found[:10], found[-10:])])
        scans.append(scan(plain, curve, lambda model: accuracy(model, dev), scale.points))
    return {
        "rows": [
            {"t": round(points[0]["t"], 3), **over_seeds("accuracy", [point["score"] for point in points])}
            for points in zip(*scans, strict=True)
        ],
        "seeds": len(scale.seeds),
        "barriers": [round(barrier(found), 4) for found in scans],
        "steps": scale.curve_steps,
        "lr": LR,
        "mean loss of the first and the last ten steps": losses,
        "examples": sum(len(batch["labels"]) for batch in dev),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    line = Line([row["t"] for row in rows], [row["accuracy"] for row in rows], error=bars(rows))
    plot_lines(path, {"fine-tuned to masked, three bends": line}, "t", "accuracy", TITLE)
