"""Does masking make the classes linearly separable, as fine-tuning does?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_mask.analysis import labels_of, pooled_states, separability, tsne
from peft_mask.analysis.plots import plot_points
from peft_mask.analysis.representations import Pooling
from reproduction.models import NAMES, Models
from reproduction.scale import Scale
from reproduction.seeds import over_seeds

TITLE = "Representations: SST-2, last block"
NOTE = (
    "Held-out accuracy of a logistic regression on the states of the last block, fitted to as many training examples; "
    "the mean over tokens is what the head reads in training. Picture: t-SNE of the means, development examples, first "
    "seed."
)


COLUMNS: dict[Pooling, str] = {"mean": "separability, mean of tokens", "first": "separability, [CLS]"}


def run(models: Models, scale: Scale) -> dict[str, Any]:
    train, dev = (models.batches("sst2", split, scale.rows) for split in ("train", "dev"))
    rows, points = [], {}
    for way in ("pretrained", "full", *scale.recipes):
        name = NAMES.get(way, way)
        found: dict[Pooling, list[float]] = {pooling: [] for pooling in COLUMNS}
        for seed in scale.seeds if way != "pretrained" else (0,):
            model = models.trained("sst2", way, seed) if way != "pretrained" else models.untrained("sst2", "full", 0)
            layer = f"bert.encoder.layer.{model.config.num_hidden_layers - 1}"
            for pooling in COLUMNS:
                fitted, held = (pooled_states(model, layer, batches, pooling) for batches in (train, dev))
                found[pooling].append(separability(fitted, labels_of(train), held, labels_of(dev)))
                if pooling == "mean" and name not in points:
                    placed = tsne(held, perplexity=min(30.0, len(held) / 4))
                    points[name] = [[round(value, 3) for value in point] for point in placed.tolist()]
        row: dict[str, Any] = {"model": name, "seeds": len(found["mean"])}
        for pooling, column in COLUMNS.items():
            figure = over_seeds(column, found[pooling])
            row |= {column: figure[column], f"{column}: deviation": figure["deviation"]}
        rows.append(row)
    return {"rows": rows, "examples": len(labels_of(dev)), "points": points, "labels": labels_of(dev).tolist()}


def draw(result: dict[str, Any], path: Path) -> None:
    labels = torch.tensor(result["labels"])
    shown = {row["model"]: row[COLUMNS["mean"]] for row in result["rows"]}
    panels = {
        f"{name}\nseparability {shown[name]:.3f}": (torch.tensor(points), labels)
        for name, points in result["points"].items()
    }
    plot_points(path, panels, ["negative", "positive"], f"{TITLE}, {len(labels)} dev examples (t-SNE)", columns=2)
