"""Does masking make the classes linearly separable, as fine-tuning does?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_mask.analysis import labels_of, pooled_states, principal_components, separability, tsne
from peft_mask.analysis.plots import plot_points
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Representations: SST-2, last block"
NOTE = (
    "Held-out accuracy of a logistic regression on the states of the last block, fitted to as many training examples; "
    "the mean over tokens is what the head reads in training. Picture: t-SNE of the means, development examples."
)


def run(models: Models, scale: Scale) -> dict[str, Any]:
    train, dev = (models.batches("sst2", split, scale.rows) for split in ("train", "dev"))
    names = {"full": "fine-tuned", "mask": "masked", "paper": "masked, paper's setting"}
    rows, points = [], {}
    for way in ("pretrained", "full", *scale.recipes):
        name = names.get(way, way)
        model = models.untrained("sst2", "full", 0) if way == "pretrained" else models.trained("sst2", way, 0)
        row: dict[str, Any] = {"model": name}
        for pooling in ("mean", "first"):
            layer = f"bert.encoder.layer.{model.config.num_hidden_layers - 1}"
            fitted = pooled_states(model, layer, train, pooling)  # type: ignore[arg-type]
            held = pooled_states(model, layer, dev, pooling)  # type: ignore[arg-type]
            figure = {"mean": "separability, mean of tokens", "first": "separability, [CLS]"}[pooling]
            row[figure] = round(separability(fitted, labels_of(train), held, labels_of(dev)), 4)
            if pooling == "mean":
                row["variance in two principal components"] = round(float(principal_components(held)[1].sum()), 3)
                placed = tsne(held, perplexity=min(30.0, len(held) / 4))
                points[name] = [[round(value, 3) for value in point] for point in placed.tolist()]
        rows.append(row)
    return {"rows": rows, "examples": len(labels_of(dev)), "points": points, "labels": labels_of(dev).tolist()}


def draw(result: dict[str, Any], path: Path) -> None:
    labels = torch.tensor(result["labels"])
    shown = {row["model"]: row["separability, mean of tokens"] for row in result["rows"]}
    panels = {
        f"{name}\nseparability {shown[name]:.3f}": (torch.tensor(points), labels)
        for name, points in result["points"].items()
    }
    plot_points(path, panels, ["negative", "positive"], f"{TITLE}, {len(labels)} dev examples (t-SNE)", columns=2)
