"""Pictures of what the analyses return. matplotlib is needed here and nowhere else in the package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Distinguishable in print and by the color-blind (Okabe and Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Line:
    """One line of a picture: points in the order they are connected; `dashed` for a control, `error` for bars."""

    x: Sequence[float | str]
    y: Sequence[float]
    dashed: bool = False
    error: Sequence[float] | None = None


def plot_lines(
    path: str | os.PathLike[str], lines: Mapping[str, Line], x: str, y: str, title: str, log: bool = False
) -> None:
    """Draw lines with a legend.

    Args:
        path: PNG, SVG or PDF file to write.
        lines: by their names in the legend.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        title: one line above.
        log: whether the vertical axis is logarithmic.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        axes.errorbar(
            line.x,
            line.y,
            yerr=line.error,
            capsize=2,
            elinewidth=1,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linestyle="--" if line.dashed else "-",
            label=name,
        )
    if log:
        axes.set_yscale("log")
    _finish(axes, x, y)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_dots(path: str | os.PathLike[str], series: Mapping[str, Mapping[str, float]], x: str, title: str) -> None:
    """Draw figures with names, one name a row, so that long ones can be read.

    Args:
        path: PNG, SVG or PDF file to write.
        series: by their names in the legend: figures by name. Names that one series lacks are left open.
        x: what the horizontal axis shows.
        title: one line above.
    """
    names = list(dict.fromkeys(name for figures in series.values() for name in figures))
    figure = Figure(figsize=(6.4, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (legend, figures) in enumerate(series.items()):
        rows = [names.index(name) for name in figures]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(
            list(figures.values()), rows, color=COLORS[i % len(COLORS)], marker=marker, linestyle="", label=legend
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    _finish(axes, x, "")
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_points(
    path: str | os.PathLike[str],
    panels: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
    title: str,
    columns: int = 3,
) -> None:
    """Draw points of several representations side by side, a color a class.

    Args:
        path: PNG, SVG or PDF file to write.
        panels: by their titles: points, (examples, 2), and their classes, int64.
        classes: names of the classes.
        title: one line above all.
        columns: panels in a row.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * min(columns, len(panels)), 3.2 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, (points, labels)) in zip(grid.flat, panels.items(), strict=False):
        for label, class_name in enumerate(classes):
            own = points[labels == label]
            axes.scatter(
                own[:, 0], own[:, 1], s=6, alpha=0.6, linewidths=0, color=COLORS[label % len(COLORS)], label=class_name
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(classes), frameon=False, fontsize=8, markerscale=2
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
