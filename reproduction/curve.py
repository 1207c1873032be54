"""A Bezier curve with three bends between the fine-tuned and the masked minimum, beside the segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.tasks import TASKS, training_batches
from peft_mask.analysis import Curve, accuracy, barrier, scan, train_curve
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.line import ends
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "A curve with three bends between minima: SST-2, development accuracy"
NOTE = "The bends are trained with Adam, one random point of the curve a batch of 32."
BENDS, LR = 3, 1e-4


def run(models: Models, scale: Scale) -> dict[str, Any]:
    plain, weights = ends(models, 0)
    train_rows, dev = models.setting.rows(TASKS["sst2"], "train"), models.batches("sst2", "dev", scale.rows)
    indices = training_batches(train_rows, 0, scale.curve_steps, models.setting.batch_size)
    curve = Curve(weights["fine-tuned"], weights["masked"], BENDS)
    losses = train_curve(plain.eval(), curve, (train_rows.batch(batch) for batch in indices), LR)
    found = scan(plain, curve, lambda model: accuracy(model, dev), scale.points)
    return {
        "rows": [{"t": round(row["t"], 3), "accuracy": round(row["score"], 4)} for row in found],
        "barrier": round(barrier(found), 4),
        "steps": scale.curve_steps,
        "lr": LR,
        "mean loss of the first and the last ten steps": [
            round(sum(part) / len(part), 4) for part in (losses[:10], losses[-10:])
        ],
        "examples": sum(len(batch["labels"]) for batch in dev),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    line = Line([row["t"] for row in rows], [row["accuracy"] for row in rows])
    plot_lines(path, {"fine-tuned to masked, three bends": line}, "t", "accuracy", TITLE)
