"""The demo's results as a markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.demo.methods import Result

HEADER = (
    "task",
    "method",
    "metric",
    "test",
    "trained",
    "adapter bytes",
    "head bytes",
    "sparsity",
    "time",
)


def table(results: Sequence[Result]) -> str:
    """Return a markdown table that fits 120 columns; time is relative to full fine-tuning on the same task."""
    full_seconds = {result.task: result.seconds for result in results if result.method == "full fine-tuning"}
    rows = [HEADER]
    for result in results:
        full = full_seconds.get(result.task)
        rows.append(
            (
                result.task,
                result.method,
                result.metric,
                f"{result.score:.3f}",
                _cell(result.trained_parameters, "{:,}"),
                _cell(result.adapter_bytes, "{:,}"),
                _cell(result.head_bytes, "{:,}"),
                _cell(result.sparsity, "{:.2%}"),
                _cell(result.seconds / full if result.seconds and full else None, "{:.2f} x"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    # names to the left, figures to the right
    lines = [
        "| " + " | ".join(f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i < 3 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot(results: Sequence[Result], words: int, file: Path) -> None:
    """Draw the test score against the bytes of the adapter for one task.

    Args:
        results: the methods on that task; those without an adapter are drawn as a floor.
        words: number of test words, for the standard error of an accuracy.
        file: PNG to write.
    """
    import matplotlib.pyplot as plt  # here, because it is slow to import and only this function needs it

    colors = {"mask": "#c2410c", "LoRA r=8": "#1d4ed8", "full fine-tuning": "#374151"}
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    points = [result for result in results if result.adapter_bytes]
    for result in results:
        error = 100 * (result.score * (1 - result.score) / words) ** 0.5
        percent = 100 * result.score
        if not result.adapter_bytes:
            axes.axhline(percent, color="#9ca3af", linestyle="--", linewidth=1)
            axes.annotate(
                f"{result.method}: {percent:.1f} %",
                (0.99, percent),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color="#6b7280",
            )
            continue
        color = colors.get(result.method, "black")
        axes.errorbar(result.adapter_bytes, percent, yerr=error, fmt="o", markersize=8, color=color, capsize=3)
        axes.annotate(
            f"{result.method}\n{percent:.1f} %, {_size(result.adapter_bytes)}",
            (result.adapter_bytes, percent),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},  # over the floor's line
        )
    axes.set_xscale("log")
    sizes = [result.adapter_bytes for result in points if result.adapter_bytes]
    axes.set_xlim(min(sizes) / 3, max(sizes) * 12)  # room for the words right of the last point
    axes.set_xticks([10.0**power for power in range(3, 10) if min(sizes) / 3 < 10**power < max(sizes) * 12])
    axes.xaxis.set_major_formatter(lambda value, _: _size(value))
    axes.set_xlabel("bytes on disk for the task, without its head (log scale)")
    axes.set_ylabel(f"test {results[0].metric}, % (bars: ± 1 standard error)")
    axes.set_title(f"{results[0].task}: one task, one base model, three ways to learn it", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(file)
    plt.close(figure)


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
