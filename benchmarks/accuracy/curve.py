"""The picture of the first page: mean accuracy against the bytes that one would store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABELS = {  # of methods whose names do not say it
    "mask": "mask 0.5 %, at once",
    "growing-mask": "mask 0.5 %",
    "mask-0.0017": "mask 0.17 %, at once",
    "mask-0.0007": "mask 0.07 %, at once",
    "full": "full fine-tuning",
    "bitfit": "BitFit",
    "ia3": "(IA)³, its default layers",
    "ia3-all": "(IA)³, all layers",
    "shira-r1": "SHiRA r=1",
}
MORE = {"qv": ", query and value", "1bit": ", 1 bit", "2bit": ", 2 bits", "4bit": ", 4 bits"}
FRONT = "#0072B2"


def label(method: str) -> str:
    """How a picture names a method."""
    if method.startswith("growing-mask-"):
        return f"mask {100 * float(method.removeprefix('growing-mask-')):g} %"
    if method.startswith("lora-r"):
        rank, _, more = method.removeprefix("lora-r").partition("-")
        return f"LoRA r={rank}" + MORE.get(more, f", {more}" if more else "")
    return LABELS.get(method, method)


def stored_bytes(mean: Mapping[str, Any]) -> float:
    """The bytes of an adapter as one would store it: numbers in bfloat16, masks as they are."""
    return mean["bfloat16_bytes"] or mean["bytes"]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, score) that none surpasses with as few bytes, from the smallest."""
    found: list[tuple[float, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((size, score))
    return found


def draw_curve(means: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the means over tasks, with one standard deviation between seeds, and the Pareto front.

    Methods without an adapter are a line. Masks are filled, others are not.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    with_bytes = [mean for mean in means if mean["bytes"]]
    for mean in with_bytes:
        size, test, own = stored_bytes(mean), 100 * mean["test"], "mask" in mean["method"]
        axes.errorbar(
            size,
            test,
            100 * (mean["sd"] or 0.0),
            fmt="o",
            markersize=7 if own else 5,
            capsize=3,
            color=FRONT if own else "#555555",
            markerfacecolor=FRONT if own else "white",
        )
        below = any(
            1 < stored_bytes(other) / size < 1.3 and abs(100 * other["test"] - test) < 0.25 for other in with_bytes
        )
        axes.annotate(
            label(mean["method"]),
            (size, test),
            xytext=(-7, -3) if below else (7, -3),
            ha="right" if below else "left",
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if own else "normal",
        )
    if with_bytes:
        best = front([(stored_bytes(mean), 100 * mean["test"]) for mean in with_bytes])
        told = "none is better with as few bytes"
        axes.plot(*zip(*best, strict=True), color=FRONT, linewidth=1, zorder=0, label=told)
    for mean in means:
        if not mean["bytes"]:
            axes.axhline(100 * mean["test"], linestyle="--", color="#999999", label="frozen model, linear probe")
    axes.set(xscale="log", xlabel="bytes of an adapter (numbers in bfloat16, without the head)")
    axes.set_ylabel("mean test accuracy, %")
    if with_bytes:
        axes.set_xlim(right=8 * max(map(stored_bytes, with_bytes)))  # room for the names
    axes.grid(alpha=0.25)
    if means:
        axes.legend(loc="center right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
