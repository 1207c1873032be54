"""How masks move in a training: flips against the start, and what is off before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.accuracy.training import train
from peft_mask import Masks
from peft_mask.analysis import masks_of, movement
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import WAYS, Models
from reproduction.scale import Scale
from reproduction.seeds import bars, over_seeds

TITLE = "Movement of a mask in training: TREC, the default"
NOTE = "IoU: of the weights that are off. Means over the seeds; the deviation is that of iou_since."


def run(models: Models, scale: Scale) -> dict[str, Any]:
    of_seeds = [_followed(models, seed, scale.every) for seed in scale.seeds]
    rows = []
    for same_step in zip(*of_seeds, strict=True):
        figures = {name: over_seeds(name, [row[name] for row in same_step]) for name in same_step[0]}
        rows.append({name: figure[name] for name, figure in figures.items()} | figures["iou_since"])
    return {"rows": rows, "seeds": len(scale.seeds)}


def _followed(models: Models, seed: int, every: int) -> list[dict[str, float]]:
    done = models.run("trec", "mask", seed)
    snapshots: list[tuple[int, Masks]] = []

    def watch(step: int, model: nn.Module) -> None:
        if step % every == 0 or step == done.steps:
            snapshots.append((step, masks_of(model)))

    train(done.task, WAYS["mask"][0], done.lr, done.seed, done.steps, models.setting, watch=watch)
    return movement(snapshots)


def draw(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"][1:]
    line = Line([row["step"] for row in rows], [row["iou_since"] for row in rows], error=bars(rows))
    plot_lines(path, {"IoU of zeros with the snapshot before": line}, "step", "share", TITLE)
