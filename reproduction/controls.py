"""Does it matter which weights are off? Masks with as many zeros in each matrix, elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import mean
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

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
from peft_mask.scores.candidates import choose_candidates
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.seeds import over_seeds

TITLE = "Controls: SST-2, masks with the same number of zeros in each matrix"
NOTE = (
    "Trained head: that of the learned mask, which it was trained with. Refitted: logistic regression on the mean of "
    "the last block's states, fitted to as many training examples, so that the head favors no mask. Each seed has its "
    "training, and draws its shuffled masks."
)
RECIPES = {"mask": "default", "paper": "paper's setting"}


HEADS = ("trained head", "head refitted")


def run(models: Models, scale: Scale) -> dict[str, Any]:
    train, dev = (models.batches("sst2", split, scale.rows) for split in ("train", "dev"))
    rows: list[dict[str, Any]] = []
    for way in scale.recipes:
        sparsities: list[float] = []
        accuracies: dict[str, list[tuple[float, float]]] = {}  # of the two heads, by mask, one pair a seed
        for seed in scale.seeds:
            model = models.trained("sst2", way, seed)
            learned = masks_of(model)
            sparsities.append(learned.sparsity)
            base = with_trained_head(models.untrained("sst2", "full", seed), model)
            for name, masks in _masks(learned, base, seed, candidates=way == "mask").items():
                control = copy.deepcopy(base)
                apply_masks(control, masks)
                layer = f"bert.encoder.layer.{control.config.num_hidden_layers - 1}"
                fitted, held = (pooled_states(control, layer, split, "mean") for split in (train, dev))
                refitted = separability(fitted, labels_of(train), held, labels_of(dev))
                accuracies.setdefault(name, []).append((accuracy(control, dev), refitted))
        for name, of_seeds in accuracies.items():
            row = {"recipe": RECIPES[way], "sparsity": round(mean(sparsities), 4), "mask": name}
            for head, values in zip(HEADS, zip(*of_seeds, strict=True), strict=True):
                figure = over_seeds(head, values)
                row |= {head: figure[head], f"{head}: deviation": figure["deviation"]}
            rows.append(row)
    return {"rows": rows, "seeds": len(scale.seeds), "examples": sum(len(batch["labels"]) for batch in dev)}


def with_trained_head(base: PreTrainedModel, model: nn.Module) -> PreTrainedModel:
    """Put the head of a trained model on a pretrained one."""
    trained = effective_weights(model)
    write_weights(
        base, {name: trained[name] if in_head(name) else own for name, own in effective_weights(base).items()}
    )
    return base


def _masks(learned: Masks, base: nn.Module, seed: int, candidates: bool) -> dict[str, Masks]:
    made = {
        "learned": learned,
        "none: every weight kept": learned | ~learned,
        "shuffled": shuffled(learned, seed),
        "smallest weights": magnitude_masks(learned, base),
        "largest weights": magnitude_masks(learned, base, largest=True),
    }
    if candidates:
        weights = {name: cast(nn.Linear, base.get_submodule(name)).weight for name in learned}
        among = {name: choose_candidates(weight, MaskConfig(), name) for name, weight in weights.items()}
        made["shuffled among candidates"] = shuffled(learned, seed, cast(dict[str, Tensor], among))
    return made


def draw(result: dict[str, Any], path: Path) -> None:
    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        for head in HEADS:
            series.setdefault(f"{row['recipe']}, {head}", {})[row["mask"]] = row[head]
    plot_dots(path, series, "development accuracy", TITLE)
