"""How masks move in a training: flips against the start, and what is off before and after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.accuracy.training import train
from peft_mask import Masks
from peft_mask.analysis import masks_of, movement
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import WAYS, Models
from reproduction.scale import Scale

TITLE = "Movement of a mask in training: TREC, the default"
NOTE = "IoU: of the weights that are off, with those of the snapshot before. One training, seed 0."


def run(models: Models, scale: Scale) -> dict[str, Any]:
    done = models.run("trec", "mask", 0)
    snapshots: list[tuple[int, Masks]] = []

    def watch(step: int, model: nn.Module) -> None:
        if step % scale.every == 0 or step == done.steps:
            snapshots.append((step, masks_of(model)))

    train(done.task, WAYS["mask"][0], done.lr, done.seed, done.steps, models.setting, watch=watch)
    # JSON has no NaN, which is the overlap of no zeros with others
    return {
        "rows": [
            {name: None if math.isnan(value) else round(value, 5) for name, value in row.items()}
            for row in movement(snapshots)
        ]
    }


def draw(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"][1:]
    line = Line([row["step"] for row in rows], [row["iou_since"] for row in rows])
    plot_lines(path, {"IoU of zeros with the snapshot before": line}, "step", "share", TITLE)
