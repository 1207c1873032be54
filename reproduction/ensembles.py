"""Several masks of one base model decide together, and several fine-tuned models: of seeds, and of snapshots."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.accuracy.training import train
from peft_mask.analysis import adapter_logits, ensemble, ensemble_table, labels_of, logits_of
from peft_mask.analysis.evaluation import share_right
from peft_mask.analysis.plots import plot_dots
from reproduction.models import WAYS, Models
from reproduction.scale import Scale

TITLE = "Ensembles: SST-2, test accuracy"
NOTE = (
    "The way to decide is chosen on development data, then scored on test. Masks of several seeds share one base model "
    "in memory. Snapshots are of one training, seed 0, with a cosine that starts again after each cycle, as long as "
    "the training of a seed: the model at the end of each."
)
WAYS_TO_DECIDE = ("labels", "logits", "probabilities")
Batches = list[dict[str, Tensor]]


def run(models: Models, scale: Scale) -> dict[str, Any]:
    dev, test = models.batches("sst2", "dev", scale.rows), models.batches("sst2", "test")
    members: dict[str, Callable[[Models, Scale, list[Batches]], list[Tensor]]] = {
        "masked, seeds": _masked,
        "fine-tuned, seeds": _finetuned,
        "masked, snapshots": lambda *given: _snapshots("mask", *given),
        "fine-tuned, snapshots": lambda *given: _snapshots("full", *given),
    }
    rows = []
    for name, compute in members.items():
        on_dev, on_test = compute(models, scale, [dev, test])
        scores = {row["who"]: row["accuracy"] for row in ensemble_table(on_dev, labels_of(dev))}
        chosen = max(WAYS_TO_DECIDE, key=lambda by: scores[by])
        of_members = [share_right(member.argmax(-1), labels_of(test)) for member in on_test]
        together = share_right(ensemble(on_test, chosen), labels_of(test))  # type: ignore[arg-type]
        rows.append(
            {
                "models": name,
                "members": len(of_members),
                "way chosen on dev": chosen,
                f"dev: {', '.join(WAYS_TO_DECIDE)}": ", ".join(f"{scores[by]:.4f}" for by in WAYS_TO_DECIDE),
                "test of each member": ", ".join(f"{score:.4f}" for score in of_members),
                "test, mean of members": round(sum(of_members) / len(of_members), 4),
                "test, ensemble": round(together, 4),
            }
        )
    return {"rows": rows, "examples": len(labels_of(test))}


def _masked(models: Models, scale: Scale, splits: list[Batches]) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        for seed in scale.seeds:
            cast(PeftModel, models.trained("sst2", "mask", seed)).save_pretrained(f"{folder}/{seed}")
        first, *others = scale.seeds
        base = models.untrained("sst2", "full", 0)
        model = PeftModel.from_pretrained(base, f"{folder}/{first}", adapter_name=str(first))  # type: ignore[arg-type]
        for seed in others:
            model.load_adapter(f"{folder}/{seed}", str(seed))
    return [adapter_logits(model, [str(seed) for seed in scale.seeds], batches) for batches in splits]


def _finetuned(models: Models, scale: Scale, splits: list[Batches]) -> list[Tensor]:
    tuned = [models.trained("sst2", "full", seed) for seed in scale.seeds]
    return [torch.stack([logits_of(model, batches) for model in tuned]) for batches in splits]


def _snapshots(way: str, models: Models, scale: Scale, splits: list[Batches]) -> list[Tensor]:
    one = models.run("sst2", way, 0)
    found: list[list[Tensor]] = [[] for _ in splits]

    def watch(step: int, model: nn.Module) -> None:
        if step and step % one.steps == 0:
            for logits, batches in zip(found, splits, strict=True):
                logits.append(logits_of(model, batches))
            model.train()

    setting = replace(models.setting, cycles=scale.cycles)
    train(one.task, WAYS[way][0], one.lr, one.seed, scale.cycles * one.steps, setting, watch=watch)
    return [torch.stack(logits) for logits in found]


def draw(result: dict[str, Any], path: Path) -> None:
    series = {}
    for row in result["rows"]:
        members = [float(score) for score in row["test of each member"].split(", ")]
        figures = {f"member {i}": score for i, score in enumerate(members)}
        series[row["models"]] = {**figures, "mean": row["test, mean of members"], "ensemble": row["test, ensemble"]}
    plot_dots(path, series, "test accuracy", TITLE)
