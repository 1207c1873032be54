r"""Which share of zeros is level with full fine-tuning on models of several sizes: a table and a picture of the rows.

    python -m benchmarks.accuracy --data FOLDER --blocks 3 --tasks trec ud_ewt_pos --methods full growing-mask \
        --results benchmarks/accuracy/results-3-blocks
    python -m benchmarks report

A model is a folder of results beside `results`. What decides is whether larger models need a smaller share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.accuracy.summary import Row, common_seeds, points_over, read_results, rows_of
from benchmarks.harness import table

TITLE = "The share of zeros that a model needs"
TASKS = ("trec", "ud_ewt_pos")  # those that every model has
NAMES = {"3-blocks": "3 blocks of MiniLM", "model": "MiniLM, 6 blocks", "all-mpnet-base-v2": "MPNet, 12 blocks"}


def points_of(folder: Path) -> list[dict[str, Any]]:
    """The masks of one model, smallest share first: test accuracy over full fine-tuning's, in points, for each task.

    Of the seeds that both have. Shares that lack a task are left out.
    """
    results = [result for result in read_results(folder) if not result["settings"].get("dropout")]
    rows = [row for row in rows_of(results) if row.task in TASKS]
    if not rows:
        return []
    full = {row.task: row for row in rows if row.method == "full"}
    masks: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.method.startswith("growing-mask") and row.task in full:
            masks.setdefault(row.method, {})[row.task] = row
    name = results[0]["settings"]["model"].split("/")[-1]
    return sorted(
        (
            {
                "model": NAMES.get(name, name),
                "weights": fmean(row.masked_weights or 0.0 for row in by_task.values()),
                "share": fmean(row.sparsity or 0.0 for row in by_task.values()),
                "bytes": fmean(row.bytes for row in by_task.values()),
                "seeds": min(len(common_seeds([by_task[task], full[task]])) for task in TASKS),
                "points": {task: points_over([by_task[task]], [full[task]]) for task in TASKS},
            }
            for by_task in masks.values()
            if all(task in by_task for task in TASKS)
        ),
        key=lambda point: point["share"],
    )


def write_shares(accuracy: Path, results: Path) -> None:
    """Write shares.md and shares.png into `results`, of the folders of results in `accuracy`."""
    models = [points_of(runs.parent) for runs in sorted(accuracy.glob("*/runs.jsonl"))]
    models = sorted((points for points in models if points), key=lambda points: points[0]["weights"])
    rows = [
        (
            point["model"],
            f"{point['weights']:,.0f}",
            f"{100 * point['share']:.2f} %",
            f"{point['bytes']:,.0f}",
            point["seeds"],
            *(f"{point['points'][task]:+.2f}" for task in TASKS),
            f"{fmean(point['points'].values()):+.2f}",
        )
        for points in models
        for point in points
    ]
    columns = ("model", "masked weights", "zeros", "bytes", "seeds", *(f"{task} over full" for task in TASKS), "mean")
    told = "Written by `python -m benchmarks report` from the rows of [each model](../accuracy/README.md)."
    picture = "![Points over full fine-tuning against the share of zeros](shares.png)"
    (results / "shares.md").write_text(f"# {TITLE}\n\n{told}\n\n{table(columns, rows)}\n\n{picture}\n", "utf-8")
    draw_shares(models, results / "shares.png")


def draw_shares(models: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw a line a model: the mean over `TASKS` of the points over full fine-tuning against the share of zeros."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for points in models:
        first = points[0]
        axes.plot(
            [100 * point["share"] for point in points],
            [fmean(point["points"].values()) for point in points],
            "o-",
            label=f"{first['model']}, {first['weights'] / 1e6:.0f} million masked weights",
        )
    axes.axhline(0, color="#999999", linestyle="--", label="full fine-tuning of the same model")
    axes.set(
        xscale="log", xlabel="zeros, % of the masked weights", ylabel="test accuracy over full fine-tuning, points"
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
