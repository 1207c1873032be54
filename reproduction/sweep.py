"""Variants of a method side by side, each at the learning rate that dev chooses from the same tries."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from benchmarks.accuracy.methods import HEAD_NOTE, mask_adamw
from benchmarks.accuracy.runs import SEARCH_SEED, Progress, Run, search, unfinished_steps
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.training import Method
from reproduction.models import Models, paper
from reproduction.scale import Scale
from reproduction.seeds import over_seeds

NOTE = (
    "Dev chooses among the same rates for each variant, one run each; test is scored once a seed. Flipped: weights "
    "whose mask is another than at the start."
)


def variant(name: str, scale: Scale, **fields: Any) -> Method:
    """The paper's setting with other `fields` of `MaskConfig`, as a method whose rate is to be chosen."""
    told = "".join(f", {field}={value}" for field, value in fields.items())
    note = f"MaskConfig.paper(head='trained'{told}), AdamW; {HEAD_NOTE}"
    return Method(f"paper-{name}", note, paper(**fields), mask_adamw, scale.rates, widen=False)


def sweep(models: Models, variants: Mapping[str, Method], scale: Scale) -> list[dict[str, Any]]:
    """Train every variant on the tasks of `scale`, and return a row each.

    Every training is kept in a file, so that a sweep which is stopped goes on where it was. The first seed of all
    variants comes before the second of any.
    """
    tasks = [TASKS[name] for name in scale.tasks]
    pairs = [(task, name, method, models.steps or task.steps) for task in tasks for name, method in variants.items()]
    progress = Progress()
    progress.left = sum(
        unfinished_steps(task, method, scale.seeds, models.folder, steps) for task, _, method, steps in pairs
    )
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in scale.seeds:
        for task, name, method, steps in pairs:
            found = search(task, method, (seed,), models.setting, models.folder, steps, progress)
            done.setdefault((task.name, name), []).extend(found)
    return [_row(models, task, name, method, steps, done[task.name, name]) for task, name, method, steps in pairs]


def _row(
    models: Models, task: Task, name: str, method: Method, steps: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    tries = {lr: Run(task, method, lr, SEARCH_SEED, steps, models.folder).read() for lr in method.lrs}
    test = [run["test"] for run in runs]
    return {
        "task": task.name,
        "variant": name,
        **over_seeds("test", test),
        "seeds": len(test),
        "dev": round(mean(run["dev"] for run in runs), 4),
        "lr": f"{runs[0]['lr']:g}",
        "dev at each rate": ", ".join(f"{lr:g}: {result['dev']:.4f}" for lr, result in tries.items() if result),
        "zeros at the end": _share("sparsity", runs),
        "flipped": _share("flip_ratio", runs),
    }


def _share(figure: str, runs: list[dict[str, Any]]) -> str | None:
    """None of models that have no masks."""
    return f"{mean(run[figure] for run in runs):.2%}" if figure in runs[0] else None
