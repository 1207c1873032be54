"""Does a mask need the pretrained weights? Parts of them are drawn anew before the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.training import Method
from peft_mask.analysis import reinitialize
from peft_mask.analysis.controls import Part
from peft_mask.analysis.plots import plot_dots
from reproduction.models import NAMES, WAYS, Models
from reproduction.scale import Scale
from reproduction.sweep import sweep

TITLE = "Parts of the base model drawn anew: test accuracy"
NOTE = (
    "N(0, 0.02) for weights, 0 for biases, before the training, which is at the rate that dev chose for the pretrained "
    "model. Flipped: weights whose mask is another than at the start."
)

PARTS: dict[str, tuple[Part, ...]] = {
    "nothing": (),
    "embeddings": ("embeddings",),
    "attention": ("attention",),
    "feed-forward": ("intermediate", "output"),
    "everything": ("embeddings", "attention", "intermediate", "output"),
}
TRAINED = ("full", "mask")


def without(part: str, way: str) -> Method:
    """A way of training, of a base model without what pretraining gave to `part`."""
    method, rate = WAYS[way]
    if not PARTS[part]:
        return replace(method, lrs=(rate,))

    def build(model: nn.Module, task_type: str) -> nn.Module:
        reinitialize(model, PARTS[part], seed=torch.initial_seed())
        return method.build(model, task_type)

    note = f"{method.note}; drawn anew before: {part}"
    return Method(f"{method.name}-without-{part}", note, build, method.optimizer, (rate,))


def run(models: Models, scale: Scale) -> dict[str, Any]:
    variants = {f"{part}, {NAMES[way]}": without(part, way) for way in TRAINED for part in PARTS}
    return {"rows": sweep(models, variants, scale)}


def draw(result: dict[str, Any], path: Path) -> None:
    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        part, name = row["variant"].split(", ")
        series.setdefault(f"{row['task']}, {name}", {})[part] = row["test"]
    plot_dots(path, series, "test accuracy", TITLE)
