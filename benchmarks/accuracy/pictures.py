"""The pictures: accuracy against the bytes that one would store, over all tasks and on each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.accuracy.summary import Row, deviation

LABELS = {  # of methods whose names do not say it
    "mask": "mask 0.5 %, at once",
    "growing-mask": "mask 0.5 %",
    "mask-0.0017": "mask 0.17 %, at once",
    "mask-0.0007": "mask 0.07 %, at once",
    "full": "full fine-tuning",
    "probe": "frozen model, linear probe",
    "bitfit": "BitFit",
    "ia3": "(IA)³, its default layers",
    "ia3-all": "(IA)³",
    "shira-r1": "SHiRA r=1",
    "c3a-all": "C3A",
    "c3a-qv": "C3A, query and value",
    "road-all": "RoAd",
    "unilora-16k": "Uni-LoRA 16k",
    "unilora-33k": "Uni-LoRA 33k",
    "vblora-all": "VB-LoRA",
    "vera-all": "VeRA",
    "fourierft-all": "FourierFT",
    "fourierft-qv": "FourierFT, query and value",
    "waveft-all": "WaveFT",
    "psoft-qv": "PSOFT, query and value",
    "supertuning-all": "Supertuning",
    "lokr-qv": "LoKr, query and value",
    "miss-qv": "MiSS r=1, query and value",
    "miss-mini-all": "MiSS",
    "ln-tuning": "LayerNorm tuning",
    "beft-value": "BEFT",
    "oft-all": "OFT",
    "tinylora-qv": "TinyLoRA, query and value",
}
MORE = {"qv": ", query and value", "1bit": ", 1 bit", "2bit": ", 2 bits", "4bit": ", 4 bits"}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
PLACES = [(7, -3), (-7, -3), (0, 7), (0, -14), (6, 6), (6, -12), (-6, 6), (-6, -12)]  # of a name, points from its mark


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


def adapters_above_probe(means: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """The marks of a picture, by method: bytes as stored, score and its spread in per cent."""
    probe = max((mean["test"] for mean in means if not mean["bytes"]), default=-math.inf)
    return {
        mean["method"]: (stored_bytes(mean), 100 * mean["test"], 100 * (mean["sd"] or 0.0))
        for mean in means
        if mean["bytes"] and mean["method"] != "full" and mean["test"] > probe
    }


def draw_curve(means: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the means over tasks, with one standard deviation between seeds, and the Pareto front.

    Full fine-tuning and a frozen probe are lines: their bytes are far from those of adapters. Masks are filled, others
    are not. What is below the probe, or a probe far below, is told in words: it would leave little room for the rest.
    """
    figure = Figure(figsize=(7.5, max(4.8, 0.27 * len(means))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = adapters_above_probe(means)
    lowest = min((test - spread for _, test, spread in points.values()), default=0.0)
    for method, point in points.items():
        _mark(axes, method, *point, markersize=7 if "mask" in method else 5, capsize=3)
    for mean in means:
        name, test, spread = label(mean["method"]), 100 * mean["test"], 100 * (mean["sd"] or 0.0)
        if mean["method"] == "full":
            axes.axhline(test, linestyle=":", color=GREEN, label=f"{name}, {stored_bytes(mean) / 1e6:.0f} MB")
            axes.axhspan(test - spread, test + spread, color=GREEN, alpha=0.12, linewidth=0)
        elif not mean["bytes"] and test > lowest - 2:
            axes.axhline(test, linestyle="--", color="#999999", label=name)
        elif mean["method"] not in points:
            axes.plot([], linestyle="none", label=f"below: {name}, {test:.1f}")
    axes.set(xlabel="bytes of an adapter (numbers in bfloat16, without the head)", ylabel="mean test accuracy, %")
    if points:  # lines alone have no place on a logarithmic axis
        axes.set_xscale("log")
        best = front([(size, test) for size, test, _ in points.values()])
        axes.plot(*zip(*best, strict=True), color=BLUE, linewidth=1, zorder=0, label="none is better with as few bytes")
        axes.set_xlim(right=4 * max(size for size, *_ in points.values()))  # room for the names
    axes.grid(alpha=0.25)
    if lines := [line for line in axes.get_lines() if not line.get_label().startswith("_")]:
        axes.legend(handles=lines, loc="center right", frameon=False, fontsize=8)
    _write_names(axes, points)
    figure.savefig(path, dpi=130)


def draw_panels(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel a task: masks, LoRA and full fine-tuning in color, a frozen probe as a line, others in grey."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row.task}, {row.steps} steps", []).append(row)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, of_task) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.set(title=title, xscale="log", xlabel="bytes, numbers in bfloat16", ylabel="test accuracy, %")
        for row in of_task:
            test = 100 * fmean(row.test)
            if row.bytes:
                size = row.bfloat16_bytes or row.bytes
                _mark(axes, row.method, size, test, 100 * (deviation(row.test) or 0.0), markersize=5, capsize=2)
            else:
                axes.axhline(test, linestyle="--", color="#999999", label="frozen model, linear probe")
        axes.grid(alpha=0.25)
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    by_label = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=len(by_label))
    figure.savefig(path, dpi=110)


def _mark(axes: Axes, method: str, size: float, test: float, spread: float, **style: Any) -> None:
    kinds = {"mask": ("masks", BLUE), "lora": ("LoRA", ORANGE), "full": ("full fine-tuning", GREEN)}
    kind = "mask" if "mask" in method else method.partition("-")[0]
    name, color = kinds.get(kind, ("other methods", GREY))
    filled = {} if kind == "mask" else {"markerfacecolor": "white"}
    axes.errorbar(size, test, spread, fmt="o", color=color, linewidth=1, label=name, **filled, **style)


def _write_names(axes: Axes, points: Mapping[str, tuple[float, float, float]]) -> None:
    """Write each method's name beside its mark, the masks' first, where it covers least of what is there.

    Points are (bytes, score, spread) by method.
    """
    figure = axes.figure.get_figure(root=True)
    figure.draw_without_rendering()  # or the layout moves the marks afterwards
    renderer = figure.canvas.get_renderer()
    taken = []
    for size, test, spread in points.values():
        (x, low), (_, high) = axes.transData.transform([(size, test - spread), (size, test + spread)])
        taken.append((x - 5, low - 5, x + 5, high + 5))
    frame = axes.bbox.extents
    for method in sorted(points, key=lambda method: ("mask" not in method, -points[method][1])):
        tried = []
        for across, up in PLACES:
            name = axes.annotate(
                label(method),
                points[method][:2],
                xytext=(across, up),
                ha="left" if across > 0 else "right" if across < 0 else "center",
                textcoords="offset points",
                fontsize=8,
                fontweight="bold" if "mask" in method else "normal",
            )
            box = tuple(name.get_window_extent(renderer).extents)
            outside = 1e6 * (box[0] < frame[0] or box[2] > frame[2] or box[1] < frame[1] or box[3] > frame[3])
            tried.append((outside + sum(_shared(box, other) for other in taken), len(tried), box, name))
        best = min(tried, key=lambda one: one[:2])
        taken.append(best[2])
        for one in tried:
            if one is not best:
                one[3].remove()


def _shared(box: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    up = min(box[3], other[3]) - max(box[1], other[1])
    return max(0.0, across) * max(0.0, up)
