"""Which blocks should be masked? The first k of them, bottom-up, against the last k, top-down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.sparsity import at_start
from reproduction.sweep import NOTE as SWEEP_NOTE
from reproduction.sweep import sweep, variant

TITLE = "Masked blocks: test accuracy"
NOTE = (
    f"Bottom-up: the first k blocks are masked; top-down: the last k. Five per cent are off at the start. {SWEEP_NOTE}"
)

DIRECTIONS = ("bottom-up", "top-down")


def run(models: Models, scale: Scale) -> dict[str, Any]:
    blocks = AutoConfig.from_pretrained(models.setting.model).num_hidden_layers
    variants = {}
    for k in scale.blocks or [2**i for i in range(blocks.bit_length()) if 2**i < blocks]:
        variants[f"bottom-up {k}"] = variant(f"bottom{k}", layers_to_transform=list(range(k)))
        variants[f"top-down {k}"] = variant(f"top{k}", layers_to_transform=list(range(blocks - k, blocks)))
    variants[f"all {blocks}"] = at_start(0.05)  # which the sweep over sparsities trains as well
    return {"rows": sweep(models, variants, scale)}


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        points = [(*row["variant"].split(), row["test"]) for row in result["rows"] if row["task"] == task]
        for direction in DIRECTIONS:
            of = [(k, test) for name, k, test in points if name in (direction, "all")]
            lines[f"{task}, {direction}"] = Line(
                [k for k, _ in of], [y for _, y in of], dashed=direction == "bottom-up"
            )
    plot_lines(path, lines, "masked blocks", "test accuracy", TITLE)
