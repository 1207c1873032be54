"""Does a model of one sentiment set work on another, masked as well as fine-tuned?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_mask.analysis import generalization
from peft_mask.analysis.plots import plot_dots
from reproduction.models import NAMES, Models
from reproduction.scale import Scale
from reproduction.seeds import over_seeds

TITLE = "Generalization to other sentiment: test accuracy"
NOTE = (
    "Sentences of film reviews (sst2), of customers' reviews (custrev) and tweets, negative or positive. Each model is "
    "trained on one of them, at the rate that its own development data chose, and scored on the test data of all. "
    "Gain: above the most common label."
)
SETS = ("sst2", "custrev", "tweets")


def run(models: Models, scale: Scale) -> dict[str, Any]:
    tests = {task: models.batches(task, "test") for task in SETS}
    rows = []
    for trained_on in SETS:
        for way in ("full", "mask"):
            lr = models.chosen_rate(trained_on, way)
            of_seeds = [
                generalization({trained_on: models.trained(trained_on, way, seed, lr)}, tests) for seed in scale.seeds
            ]
            for found in zip(*of_seeds, strict=True):
                row = {"trained on": trained_on, "model": NAMES[way], "tested on": found[0]["dataset"]}
                row |= over_seeds("accuracy", [one["accuracy"] for one in found])
                row["gain"] = round(row["accuracy"] - found[0]["majority"], 4)
                rows.append(row | {"lr": f"{lr:g}"})
    counts = {task: sum(len(batch["labels"]) for batch in batches) for task, batches in tests.items()}
    return {"rows": rows, "seeds": len(scale.seeds), "examples": counts}


def draw(result: dict[str, Any], path: Path) -> None:
    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        pair = f"{row['trained on']} to {row['tested on']}"
        series.setdefault(row["model"], {})[pair] = row["accuracy"]
    plot_dots(path, series, "test accuracy", TITLE)
