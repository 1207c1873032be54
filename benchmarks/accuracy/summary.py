"""Results -> figures: a row for each method and task, and means over tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.accuracy.methods import METHODS, QUANTIZED
from benchmarks.accuracy.runs import SEARCH_SEED, runs_in
from benchmarks.accuracy.tasks import TASKS

Result = dict[str, Any]
ANCHORS = ("growing-mask", "full", "lora-r8", "lora-r1")  # what others are compared with


@dataclass(frozen=True)
class Row:
    """A method on a task at the learning rate that dev chose: means over the seeds whose test was scored.

    `test` and `dev` hold one score a seed. `bytes` leaves the head out, which stands in `head_bytes`; `bytes_on_base`
    is what masks take with `portable=False`.
    """

    task: str
    method: str
    steps: int
    lr: float
    seeds: tuple[int, ...]
    test: tuple[float, ...]
    dev: tuple[float, ...]
    tries: dict[str, float]
    trained_parameters: int
    bytes: float
    head_bytes: float
    sparsity: float | None
    bits_per_weight: float | None
    entropy_bytes: float | None
    train_seconds: float
    bytes_on_base: float | None = None
    masked_weights: float | None = None
    dtype: str = "float32"

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest of those tried."""
        rates = [float(lr) for lr in self.tries]
        return len(rates) > 1 and not min(rates) < self.lr < max(rates)

    @property
    def bfloat16_bytes(self) -> float | None:
        """`bytes` with the adapter's numbers in bfloat16, counted if it was saved in float32; None without numbers."""
        if self.bits_per_weight is not None or not self.bytes:
            return None
        if self.dtype != "float32":
            return self.bytes
        return self.bytes - 2 * (self.trained_parameters - self.head_bytes / 4)


def read_results(results: Path) -> list[Result]:
    """All results in the folder `results`."""
    return list(runs_in(results).read().values())


def rows_of(results: Sequence[Result]) -> list[Row]:
    """One row for each task, budget and method with a test score, in the order of the tables of tasks and methods."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["task"], result["steps"], result["method"]), []).append(result)
    tasks, methods = list(TASKS), [*METHODS, *QUANTIZED]
    rows = [row for group in groups.values() if (row := _row(group))]
    return sorted(rows, key=lambda row: (tasks.index(row.task), row.steps, methods.index(row.method)))


def _row(group: Sequence[Result]) -> Row | None:
    """The row of the rate that dev likes best, the smallest of equal ones; None while its test is not scored."""
    tries = sorted((result for result in group if result["seed"] == SEARCH_SEED), key=lambda result: result["lr"])
    chosen = max(tries, key=lambda result: result["dev"], default=None)
    scored = sorted(
        (result for result in group if "test" in result and chosen and result["lr"] == chosen["lr"]),
        key=lambda result: result["seed"],
    )
    if not scored:
        return None
    first = scored[0]

    def mean(key: str) -> float | None:
        return _mean(result.get(key) for result in scored)

    head = mean("head_bytes") or 0.0
    return Row(
        task=first["task"],
        method=first["method"],
        steps=first["steps"],
        lr=first["lr"],
        seeds=tuple(result["seed"] for result in scored),
        test=tuple(result["test"] for result in scored),
        dev=tuple(result["dev"] for result in scored),
        tries={f"{result['lr']:g}": result["dev"] for result in tries},
        trained_parameters=first["trained_parameters"],
        bytes=(mean("bytes") or 0.0) - head,
        head_bytes=head,
        sparsity=mean("sparsity"),
        bits_per_weight=mean("bits_per_weight"),
        entropy_bytes=mean("entropy_bytes"),
        train_seconds=mean("train_seconds") or 0.0,
        bytes_on_base=_known_mean(result.get("bytes_on_base") for result in scored),
        masked_weights=mean("masked_weights"),
        dtype=first.get("dtype", "float32"),
    )


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over tasks, for each method that has a row for every task and budget.

    `sd` is that of the mean over tasks between seeds (None where a method ran one seed). Differences are to the full
    fine-tuning and the LoRA of the same tasks, in points; `bytes_ratio` is LoRA r=8's bytes over the method's.
    """
    count = len({(row.task, row.steps) for row in rows})
    means = [mean_over(own) for own in by_method(rows).values() if len(own) == count]
    found = {mean["method"]: mean for mean in means}
    for mean in means:
        for anchor in ("full", "lora-r8", "lora-r1"):
            if anchor in found:
                mean[f"points_over_{anchor}"] = 100 * (mean["test"] - found[anchor]["test"])
        if "lora-r8" in found and mean["bytes"]:
            mean["bytes_ratio"] = found["lora-r8"]["bytes"] / mean["bytes"]
    return means


def summarize_parts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over the tasks that a method has, for each that lacks some; the best of a set of tasks first.

    `points_over_X` is the difference, in points, to X of `ANCHORS` on the same tasks and seeds, where X has them.
    """
    count = len({(row.task, row.steps) for row in rows})
    methods = by_method(rows)
    parts = []
    for own in methods.values():
        if len(own) == count:
            continue
        settings = {(row.task, row.steps) for row in own}
        part = mean_over(own) | {"names": [row.task for row in own]}
        for anchor in ANCHORS:
            there = [row for row in methods.get(anchor, ()) if (row.task, row.steps) in settings]
            if len(there) == len(own) and all(set(part["seeds"]) <= set(row.seeds) for row in there):
                part[f"points_over_{anchor}"] = points_over(own, there)
        parts.append(part)
    return sorted(parts, key=lambda part: (part["names"], -part["test"]))


def points_over(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """How many points one method's mean test accuracy is above another's, of the same tasks, on the seeds of both."""
    seeds = common_seeds([*rows, *others])
    return 100 * (mean_over(rows, seeds)["test"] - mean_over(others, seeds)["test"])


def common_seeds(rows: Sequence[Row]) -> list[int]:
    return sorted(set.intersection(*(set(row.seeds) for row in rows)))


def summarize_alike(rows: Sequence[Row], parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means of every method over the tasks that most of `parts` have, of the first seed alone: what can be compared."""
    sets = Counter(tuple(part["names"]) for part in parts if part["tasks"] > 1)
    if not sets:
        return []
    names = sets.most_common(1)[0][0]
    on_them = by_method([row for row in rows if row.task in names and SEARCH_SEED in row.seeds])
    return [mean_over(own, [SEARCH_SEED]) for own in on_them.values() if len(own) == len(names)]


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    return methods


def mean_over(rows: Sequence[Row], seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Means over one method's rows, a task each; of these seeds, or of those that all rows have, if there are any."""
    common = common_seeds(rows)
    by_seed = [fmean(row.test[row.seeds.index(seed)] for row in rows) for seed in seeds or common]
    return {
        "method": rows[0].method,
        "tasks": len(rows),
        "seeds": common,
        "test": fmean(by_seed) if by_seed else fmean(fmean(row.test) for row in rows),
        "sd": deviation(by_seed),
        "dev": fmean(fmean(row.dev) for row in rows),
        "bytes": fmean(row.bytes for row in rows),
        "bfloat16_bytes": _mean(row.bfloat16_bytes for row in rows),
        "bytes_on_base": _known_mean(row.bytes_on_base for row in rows),
        "bits_per_weight": _mean(row.bits_per_weight for row in rows),
        "sparsity": _mean(row.sparsity for row in rows),
        "at_edge": sum(row.at_edge for row in rows),
    }


def deviation(scores: Sequence[float]) -> float | None:
    """The standard deviation, or None of one score."""
    return stdev(scores) if len(scores) > 1 else None


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None where a value is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if len(known) == len(found) else None


def _known_mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
