"""Does it matter which weights are off? Masks with as many zeros in each matrix, elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from benchmarks.accuracy.sizes import in_head
from peft_mask import MaskConfig, Masks
from peft_mask.analysis import (
    accuracy,
    apply_masks,
    effective_weights,
    labels_of,
    magnitude_masks,
    masks_of,
    pooled_states,
    separability,
    shuffled,
    write_weights,
)
from peft_mask.analysis.plots import plot_dots
from peft_mask.candidates import choose_candidates
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Controls: SST-2, masks with the same number of zeros in each matrix"
NOTE = (
    "Trained head: that of the learned mask, which it was trained with. Refitted: logistic regression on the mean of "
    "the last block's states, fitted to as many training examples, so that the head favors no mask."
)


def run(models: Models, scale: Scale) -> dict[str, Any]:
    train, dev = (models.batches("sst2", split, scale.rows) for split in ("train", "dev"))
    rows = []
    for way in scale.recipes:
        recipe = {"mask": "default", "paper": "paper's setting"}[way]
        model = models.trained("sst2", way, 0)
        learned, trained = masks_of(model), effective_weights(model)
        base = models.untrained("sst2", "full", 0)
        write_weights(
            base, {name: trained[name] if in_head(name) else own for name, own in effective_weights(base).items()}
        )
        for name, masks in _masks(learned, base, candidates=way == "mask").items():
            control = copy.deepcopy(base)
            apply_masks(control, masks)
            layer = f"bert.encoder.layer.{control.config.num_hidden_layers - 1}"
            fitted, held = (pooled_states(control, layer, split, "mean") for split in (train, dev))
            rows.append(
                {
                    "recipe": recipe,
                    "sparsity": round(learned.sparsity, 4),
                    "mask": name,
                    "accuracy, trained head": round(accuracy(control, dev), 4),
                    "accuracy, head refitted": round(separability(fitted, labels_of(train), held, labels_of(dev)), 4),
                }
            )
    return {"rows": rows, "examples": sum(len(batch["labels"]) for batch in dev)}


def _masks(learned: Masks, base: nn.Module, candidates: bool) -> dict[str, Masks]:
    made = {
        "learned": learned,
        "none: every weight kept": learned | ~learned,
        "shuffled, seed 0": shuffled(learned, 0),
        "shuffled, seed 1": shuffled(learned, 1),
        "smallest weights": magnitude_masks(learned, base),
        "largest weights": magnitude_masks(learned, base, largest=True),
    }
    if candidates:
        weights = {name: cast(nn.Linear, base.get_submodule(name)).weight for name in learned}
        among = {name: choose_candidates(weight, MaskConfig(), name) for name, weight in weights.items()}
        for seed in (0, 1):
            made[f"shuffled among candidates, seed {seed}"] = shuffled(learned, seed, cast(dict[str, Tensor], among))
    return made


def draw(result: dict[str, Any], path: Path) -> None:
    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        for column in ("trained head", "head refitted"):
            series.setdefault(f"{row['recipe']}, {column}", {})[row["mask"]] = row[f"accuracy, {column}"]
    plot_dots(path, series, "development accuracy", TITLE)
