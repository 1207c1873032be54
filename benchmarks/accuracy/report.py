"""Results -> a page of tables and two pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy.pictures import draw_curve, draw_panels
from benchmarks.accuracy.summary import (
    ANCHORS,
    Result,
    Row,
    deviation,
    read_results,
    rows_of,
    summarize,
    summarize_alike,
    summarize_parts,
)


def write_report(results: Path) -> str:
    """Writes README.md, summary.json and the pictures into `results`; returns the tables of the means."""
    found = read_results(results)
    rows = rows_of(found)
    if not rows:
        return f"no test score in {results} yet"
    means, parts = summarize(rows), summarize_parts(rows)
    tables = [_means_table(means), *([_parts_table(parts)] if parts else [])]
    figures = {"means": means, "parts": parts, "rows": [asdict(row) for row in rows]}
    (results / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    draw_panels(rows, results / "accuracy.png")
    draw_curve(means, results / "curve.png")
    sections = ["## Means over tasks", tables[0], "![mean accuracy against bytes](curve.png)"]
    sections.append("Bars, and a band, are one standard deviation of that mean between the seeds.")
    if parts:
        sections += ["## On some of the tasks", tables[1]]
    if alike := summarize_alike(rows, parts):
        draw_curve([mean for mean in alike if not mean["method"].startswith("mask")], results / "parts.png")
        sections.append("![accuracy against bytes, on the same tasks, of the first seed](parts.png)")
    (results / "README.md").write_text(_page(found, rows, sections), "utf-8")
    return "\n\n".join(tables)


def _page(found: Sequence[Result], rows: Sequence[Row], sections: Sequence[str]) -> str:
    head = (
        "| method | lr | test, % | dev, % | trained parameters | adapter bytes | head bytes | zeros | bits a weight "
        "| entropy bytes | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    parts = [
        "# Accuracy for its size",
        "Written by `python -m benchmarks.accuracy report` from the rows of [runs.jsonl](runs.jsonl), one a training; "
        "what is measured, and how, stands in [the page above](../README.md).",
        *sections,
        "## Task by task",
        "![accuracy against bytes, task by task](accuracy.png)",
    ]
    for task, steps in dict.fromkeys((row.task, row.steps) for row in rows):
        parts += [f"## {task}, {steps} steps", head]
        parts[-1] += "".join("\n" + _line(row) for row in rows if (row.task, row.steps) == (task, steps))
    tries = "| task | steps | method | dev, % at each learning rate tried (probe: C) | the best is at the edge |"
    tries += "\n|---|---|---|---|---|"
    for row in rows:
        scores = ", ".join(f"{lr}: {100 * dev:.2f}" for lr, dev in row.tries.items())
        tries += f"\n| {row.task} | {row.steps} | {row.method} | {scores} | {'yes' if row.at_edge else ''} |"
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
    columns = "| method | tasks | test, % | over full | over LoRA r=8 | over LoRA r=1"
    return _table(columns, means, ("full", "lora-r8", "lora-r1"))


def _parts_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """Methods without a row for every task, each beside others on its own tasks and seeds."""
    told = "Means and differences are those of the seeds that a method has on all of its tasks.\n\n"
    columns = "| method | tasks, seeds | test, % | over the mask | over full | over LoRA r=8 | over LoRA r=1"
    return told + _table(columns, parts, ANCHORS)


def _table(columns: str, means: Sequence[Mapping[str, Any]], anchors: Sequence[str]) -> str:
    columns += (
        " | adapter bytes | in bfloat16 | coded on its base | times smaller than LoRA r=8 | zeros | bits a weight "
        "| best rate at the edge |"
    )
    lines = [columns, "|---" * (columns.count("|") - 1) + "|"]
    for mean in means:
        spread = "" if mean["sd"] is None else f" ± {100 * mean['sd']:.2f}"
        tasks = f"{', '.join(mean['names'])}; {len(mean['seeds'])}" if "names" in mean else str(mean["tasks"])
        cells = [
            mean["method"],
            tasks,
            f"{100 * mean['test']:.2f}{spread}",
            *(_optional(mean.get(f"points_over_{anchor}"), lambda x: f"{x:+.2f}") for anchor in anchors),
            f"{mean['bytes']:,.0f}",
            _optional(mean["bfloat16_bytes"], lambda x: f"{x:,.0f}"),
            _optional(mean["bytes_on_base"], lambda x: f"{x:,.0f}"),
            _optional(mean.get("bytes_ratio"), lambda x: f"{x:.2f}"),
            _optional(mean["sparsity"], lambda x: f"{100 * x:.2f} %"),
            _optional(mean["bits_per_weight"], lambda x: f"{x:.4f}"),
            f"{mean['at_edge']} of {mean['tasks']}",
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


def _scores(scores: Sequence[float]) -> str:
    sd = deviation(scores)
    return f"{100 * fmean(scores):.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
