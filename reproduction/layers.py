"""Which blocks should be masked? The first k of them, bottom-up, against the last k, top-down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.seeds import bars
from reproduction.sparsity import at_start
from reproduction.sweep import NOTE as SWEEP_NOTE
from reproduction.sweep import sweep, variant

TITLE = "Masked blocks: test accuracy"
NOTE = (
    "The paper's setting with a trained head, five per cent off at the start. Bottom-up: the first k blocks are "
    f"masked; top-down: the last k. {SWEEP_NOTE}"
)

DIRECTIONS = ("bottom-up", "top-down")


def run(models: Models, scale: Scale) -> dict[str, Any]:
    blocks = AutoConfig.from_pretrained(models.setting.model).num_hidden_layers
    variants = {}
    for k in scale.blocks or [2**i for i in range(blocks.bit_length()) if 2**i < blocks]:
        variants[f"bottom-up {k}"] = variant(f"bottom{k}", scale, layers_to_transform=list(range(k)))
        variants[f"top-down {k}"] = variant(f"top{k}", scale, layers_to_transform=list(range(blocks - k, blocks)))
    variants[f"all {blocks}"] = at_start(0.05, scale)  # which the sweep over sparsities trains as well
    return {"rows": sweep(models, variants, scale)}


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        for direction in DIRECTIONS:
            rows = [
                row for row in result["rows"] if row["task"] == task and row["variant"].split()[0] in (direction, "all")
            ]
            blocks = [row["variant"].split()[1] for row in rows]
            test = [row["test"] for row in rows]
            dashed = direction == "bottom-up"
            lines[f"{task}, {direction}"] = Line(blocks, test, dashed, bars(rows))
    plot_lines(path, lines, "masked blocks", "test accuracy", TITLE)
