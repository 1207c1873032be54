"""How many weights should be off at the start? A sweep over the initial sparsity of the paper's setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.training import Method
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.seeds import bars
from reproduction.sweep import NOTE as SWEEP_NOTE
from reproduction.sweep import sweep, variant

TITLE = "Initial sparsity: test accuracy"
NOTE = (
    "The paper's setting with a trained head. Scores start as U(-0.02, s) around the threshold 0.01; s makes the share "
    f"that is off at the start. {SWEEP_NOTE}"
)


def at_start(sparsity: float, scale: Scale) -> Method:
    return variant(f"{sparsity:g}", scale, init_sparsity=sparsity)


def run(models: Models, scale: Scale) -> dict[str, Any]:
    return {"rows": sweep(models, {f"{p:.0%}": at_start(p, scale) for p in scale.sparsities}, scale)}


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["task"] == task]
        lines[task] = Line([row["variant"] for row in rows], [row["test"] for row in rows], error=bars(rows))
    plot_lines(path, lines, "weights off at the start", "test accuracy", TITLE)
