"""Several masks of one base model decide together, and several fine-tuned models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from peft_mask.analysis import adapter_logits, ensemble, ensemble_table, labels_of, logits_of
from peft_mask.analysis.evaluation import share_right
from peft_mask.analysis.plots import plot_dots
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Ensembles over seeds: SST-2, test accuracy"
NOTE = "The way to decide is chosen on development data, then scored on test. The masks share one base model in memory."


def run(models: Models, scale: Scale) -> dict[str, Any]:
    dev, test = models.batches("sst2", "dev", scale.rows), models.batches("sst2", "test", scale.rows)
    rows = []
    for method, compute in (("masked", _masked), ("fine-tuned", _finetuned)):
        on_dev, on_test = (compute(models, scale, split) for split in (dev, test))
        scores = {row["who"]: row["accuracy"] for row in ensemble_table(on_dev, labels_of(dev))}
        chosen = max(("labels", "logits", "probabilities"), key=lambda by: scores[by])
        of_members = [share_right(member.argmax(-1), labels_of(test)) for member in on_test]
        together = share_right(ensemble(on_test, chosen), labels_of(test))  # type: ignore[arg-type]
        rows.append(
            {
                "models": method,
                "members": len(of_members),
                "way chosen on dev": chosen,
                "dev: " + ", ".join(("labels", "logits", "probabilities")): ", ".join(
                    f"{scores[by]:.4f}" for by in ("labels", "logits", "probabilities")
                ),
                "test of each member": ", ".join(f"{score:.4f}" for score in of_members),
                "test, mean of members": round(sum(of_members) / len(of_members), 4),
                "test, ensemble": round(together, 4),
            }
        )
    return {"rows": rows, "examples": len(labels_of(test))}


def _masked(models: Models, scale: Scale, batches: list[dict[str, Tensor]]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        for seed in scale.seeds:
            cast(PeftModel, models.trained("sst2", "mask", seed)).save_pretrained(f"{folder}/{seed}")
        first, *others = scale.seeds
        base = models.untrained("sst2", "full", 0)
        model = PeftModel.from_pretrained(base, f"{folder}/{first}", adapter_name=str(first))  # type: ignore[arg-type]
        for seed in others:
            model.load_adapter(f"{folder}/{seed}", str(seed))
    return adapter_logits(model, [str(seed) for seed in scale.seeds], batches)


def _finetuned(models: Models, scale: Scale, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([logits_of(models.trained("sst2", "full", seed), batches) for seed in scale.finetuned_seeds])


def draw(result: dict[str, Any], path: Path) -> None:
    series = {}
    for row in result["rows"]:
        members = [float(score) for score in row["test of each member"].split(", ")]
        figures = {f"member {i}": score for i, score in enumerate(members)}
        series[row["models"]] = {**figures, "mean": row["test, mean of members"], "ensemble": row["test, ensemble"]}
    plot_dots(path, series, "test accuracy", TITLE)
