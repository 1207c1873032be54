"""Results -> tables and a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.accuracy.curve import draw_curve
from benchmarks.accuracy.methods import METHODS, QUANTIZED
from benchmarks.accuracy.runs import SEARCH_SEED, runs_in
from benchmarks.accuracy.tasks import TASKS

Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A method on a task at the learning rate that dev chose: means over the seeds whose test was scored.

    `test` and `dev` hold one score a seed. `bytes` leaves the head out, which stands in `head_bytes`.
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
    dtype: str = "float32"

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
    rows = [_row(group) for group in groups.values() if any("test" in result for result in group)]
    return sorted(rows, key=lambda row: (tasks.index(row.task), row.steps, methods.index(row.method)))


def _row(group: Sequence[Result]) -> Row:
    scored = sorted((result for result in group if "test" in result), key=lambda result: result["seed"])
    first = scored[0]
    rates = sorted({result["lr"] for result in scored})
    if len(rates) > 1:
        raise ValueError(
            f"{first['method']} on {first['task']} has test scores at the rates {rates}, but dev chooses one: delete "
            "the rows of the others."
        )

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
        tries={f"{r['lr']:g}": r["dev"] for r in sorted(group, key=lambda r: r["lr"]) if r["seed"] == SEARCH_SEED},
        trained_parameters=first["trained_parameters"],
        bytes=(mean("bytes") or 0.0) - head,
        head_bytes=head,
        sparsity=mean("sparsity"),
        bits_per_weight=mean("bits_per_weight"),
        entropy_bytes=mean("entropy_bytes"),
        train_seconds=mean("train_seconds") or 0.0,
        dtype=first.get("dtype", "float32"),
    )


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over tasks, for each method that has a row for every task and budget.

    `sd` is that of the mean over tasks between seeds (None where a method ran one seed). Differences are to the full
    fine-tuning and the LoRA of the same tasks, in points; `bytes_ratio` is LoRA r=8's bytes over the method's.
    """
    settings = sorted({(row.task, row.steps) for row in rows})
    means: list[dict[str, Any]] = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        if len(own) < len(settings):
            continue
        seeds = sorted(set.intersection(*(set(row.seeds) for row in own)))
        by_seed = [fmean(row.test[row.seeds.index(seed)] for row in own) for seed in seeds]
        means.append(
            {
                "method": method,
                "tasks": len(settings),
                "seeds": seeds,
                "test": fmean(fmean(row.test) for row in own),
                "sd": stdev(by_seed) if len(by_seed) > 1 else None,
                "dev": fmean(fmean(row.dev) for row in own),
                "bytes": fmean(row.bytes for row in own),
                "bfloat16_bytes": _mean(row.bfloat16_bytes for row in own),
                "bits_per_weight": _mean(row.bits_per_weight for row in own),
                "sparsity": _mean(row.sparsity for row in own),
            }
        )
    found = {mean["method"]: mean for mean in means}
    for mean in means:
        for anchor in ("full", "lora-r8", "lora-r1"):
            if anchor in found:
                mean[f"points_over_{anchor}"] = 100 * (mean["test"] - found[anchor]["test"])
        if "lora-r8" in found and mean["bytes"]:
            mean["bytes_ratio"] = found["lora-r8"]["bytes"] / mean["bytes"]
    return means


def write_report(results: Path) -> str:
    """Writes README.md, summary.json, accuracy.png and curve.png into `results`; returns the table of the means."""
    found = read_results(results)
    rows = rows_of(found)
    if not rows:
        return f"no test score in {results} yet"
    means = summarize(rows)
    table = _means_table(means)
    (results / "summary.json").write_text(
        json.dumps({"means": means, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", "utf-8"
    )
    draw(rows, means, results / "accuracy.png")
    draw_curve(means, results / "curve.png")
    (results / "README.md").write_text(_page(found, rows, table), "utf-8")
    return table


def draw(rows: Sequence[Row], means: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the adapter's bytes without the head; the frozen probe, which has no adapter, as a line.

    Methods that differ in their size alone, such as LoRA's ranks, share a color and a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, float, float, float]]] = {}
    panels["mean over tasks"] = [(m["method"], m["bytes"], m["test"], m["sd"] or 0.0) for m in means]
    for row in rows:
        title = f"{row.task}, {row.steps} steps"
        panels.setdefault(title, []).append((row.method, row.bytes, fmean(row.test), _sd(row.test) or 0.0))
    families = list(dict.fromkeys(_family(row.method) for row in rows))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, points) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.set(title=title, xscale="log", xlabel="adapter bytes, head left out", ylabel="test accuracy, %")
        for i, family in enumerate(families):
            own = sorted((size, 100 * test, 100 * sd) for method, size, test, sd in points if _family(method) == family)
            if own and own[0][0] > 0:
                size, test, sd = zip(*own, strict=True)
                axes.set_ymargin(0.1)  # room for the names
                axes.errorbar(size, test, sd, fmt="o-", lw=1, ms=5, capsize=3, color=f"C{i}", label=family)
            elif own:
                axes.axhline(own[0][1], linestyle="--", color=f"C{i}", label=f"{family} (no adapter)")
        axes.grid(alpha=0.3)
    if sizes := [m["bytes"] for m in means if m["bytes"] > 0]:
        figure.axes[0].set_xlim(min(sizes) / 20, max(sizes) * 3)
    in_family = Counter(_family(m["method"]) for m in means)
    for method, size, test, _ in panels["mean over tasks"]:
        if size > 0 and in_family[_family(method)] > 1:  # the others are named by their color
            point = (size, 100 * test)
            left = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right", "fontsize": 7}
            figure.axes[0].annotate(method, point, **left)
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    by_label = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=len(by_label))
    figure.savefig(path, dpi=110)


def _family(method: str) -> str:
    return method.partition("-")[0]


def _page(found: Sequence[Result], rows: Sequence[Row], table: str) -> str:
    head = (
        "| method | lr | test, % | dev, % | trained parameters | adapter bytes | head bytes | zeros | bits a weight "
        "| entropy bytes | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    parts = [
        "# Accuracy for its size",
        "Written by `python -m benchmarks.accuracy report` from the rows of [runs.jsonl](runs.jsonl), one a training; "
        "what is measured, and how, stands in [the page above](../README.md).",
        "## Means over tasks",
        table,
        "![accuracy against bytes](accuracy.png)",
    ]
    for task, steps in dict.fromkeys((row.task, row.steps) for row in rows):
        parts += [f"## {task}, {steps} steps", head]
        parts[-1] += "".join("\n" + _line(row) for row in rows if (row.task, row.steps) == (task, steps))
    tries = "| task | steps | method | dev, % at each learning rate tried (probe: C) |\n|---|---|---|---|"
    for row in rows:
        scores = ", ".join(f"{lr}: {100 * dev:.2f}" for lr, dev in row.tries.items())
        tries += f"\n| {row.task} | {row.steps} | {row.method} | {scores} |"
    parts += ["## The choice on dev, seed 0", tries, "## Settings and machine", _origins(found)]
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    cells = [
        row.method,
        f"{row.lr:g}",
        _scores(row.test),
        _scores(row.dev),
        f"{row.trained_parameters:,}",
        f"{row.bytes:,.0f}",
        f"{row.head_bytes:,.0f}",
        _optional(row.sparsity, lambda x: f"{100 * x:.2f} %"),
        _optional(row.bits_per_weight, lambda x: f"{x:.4f}"),
        _optional(row.entropy_bytes, lambda x: f"{x:,.0f}"),
        f"{row.train_seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _means_table(means: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| method | tasks | test, % | over full | over LoRA r=8 | over LoRA r=1 | adapter bytes | in bfloat16 "
        "| times smaller than LoRA r=8 | zeros | bits a weight |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mean in means:
        spread = "" if mean["sd"] is None else f" ± {100 * mean['sd']:.2f}"
        points = [
            _optional(mean.get(f"points_over_{anchor}"), lambda x: f"{x:+.2f}")
            for anchor in ("full", "lora-r8", "lora-r1")
        ]
        cells = [
            mean["method"],
            str(mean["tasks"]),
            f"{100 * mean['test']:.2f}{spread}",
            *points,
            f"{mean['bytes']:,.0f}",
            _optional(mean["bfloat16_bytes"], lambda x: f"{x:,.0f}"),
            _optional(mean.get("bytes_ratio"), lambda x: f"{x:.2f}"),
            _optional(mean["sparsity"], lambda x: f"{100 * x:.2f} %"),
            _optional(mean["bits_per_weight"], lambda x: f"{x:.4f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _origins(found: Sequence[Result]) -> str:
    """Each setting and version once, with all the values it had."""
    values: dict[str, dict[str, None]] = {}
    for result in found:
        for key, value in {**result["settings"], **result["environment"]}.items():
            if key != "method":
                values.setdefault(key, {})[str(value)] = None
    for result in found:
        values.setdefault(result["method"], {})[result["settings"]["method"]] = None
    return "\n".join(f"- {key}: {'; '.join(seen)}" for key, seen in values.items())


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None where a value is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if len(known) == len(found) else None


def _sd(scores: Sequence[float]) -> float | None:
    return stdev(scores) if len(scores) > 1 else None


def _scores(scores: Sequence[float]) -> str:
    sd = _sd(scores)
    return f"{100 * fmean(scores):.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
