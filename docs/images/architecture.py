"""Draws architecture.png: `python docs/images/architecture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

NOUNS = {  # name -> position, what it is
    "scores": ((0, 2), "real, trained"),
    "mask": ((3.2, 2), "0 / 1"),
    "masked weight": ((7.2, 2), "W ⊙ M"),
    "bits": ((3.2, 0), "packed, 1/8 byte a weight"),
    "file": ((7.2, 0), "records, coded"),
    "start": ((-3.2, 2), "MaskConfig"),
}
ARROWS = [  # from, to, file, bend
    ("start", "scores", "init.py", 0),
    ("scores", "mask", "binarize.py", 0),
    ("mask", "masked weight", "functional.py", 0.0),
    ("masked weight", "scores", "functional.py: straight-through gradient", 0.28),
    ("mask", "bits", "packing.py", 0.25),
    ("bits", "mask", "packing.py", 0.25),
    ("bits", "file", "record.py, coding.py", -0.22),
    ("file", "bits", "record.py, coding.py", -0.22),
]
INK, PALE, ACCENT = "#1d2733", "#eef2f6", "#b3541e"


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 4.9))
    for name, ((x, y), note) in NOUNS.items():
        box = FancyBboxPatch((x - 0.85, y - 0.33), 1.7, 0.66, boxstyle="round,pad=0.05", fc=PALE, ec=INK, lw=1.2)
        axes.add_patch(box)
        axes.text(x, y + 0.1, name, ha="center", va="center", fontsize=12, weight="bold", color=INK)
        axes.text(x, y - 0.17, note, ha="center", va="center", fontsize=8.5, color=INK)
    for start, end, file, bend in ARROWS:
        draw_arrow(axes, start, end, file, bend)
    notes = {
        1.25: "training touches scores only:\nlayer.py, model.py, training.py",
        0.1: "after it there are only masks and bits:\nlayer.py (merge, unmerge), state.py (save, load),\n"
        "masks.py (an adapter as a value)",
    }
    for y, text in notes.items():
        axes.text(-4.05, y, text, ha="left", va="center", fontsize=9.5, style="italic", color=INK)
    axes.set(xlim=(-4.3, 8.3), ylim=(-0.6, 3.75))
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def draw_arrow(axes: plt.Axes, start: str, end: str, file: str, bend: float) -> None:
    (x0, y0), (x1, y1) = NOUNS[start][0], NOUNS[end][0]
    horizontal = y0 == y1
    reach = 0.92 if horizontal else 0.42
    if horizontal:
        far = abs(x1 - x0) > 4
        tail = (x0, y0 + 0.4) if far else (x0 + reach * (1 if x1 > x0 else -1), y0)
        head = (x1, y1 + 0.4) if far else (x1 - reach * (1 if x1 > x0 else -1), y1)
    else:
        tail, head = (x0, y0 + reach * (1 if y1 > y0 else -1)), (x1, y1 - reach * (1 if y1 > y0 else -1))
    style = {"arrowstyle": "-|>", "color": ACCENT, "lw": 1.6, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", head, tail, arrowprops=style)
    middle = ((tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2)
    if not horizontal:
        side = 1 if y1 < y0 else -1
        axes.text(middle[0] - side * 0.35, middle[1], file, ha="right" if side > 0 else "left", va="center",
                  fontsize=9, family="monospace", color=ACCENT)  # fmt: skip
        return
    length = head[0] - tail[0]
    lift = -bend * length / 2
    above = lift >= -1e-9
    axes.text(middle[0], middle[1] + lift + (0.1 if above else -0.1), file, ha="center",
              va="bottom" if above else "top", fontsize=9, family="monospace", color=ACCENT)  # fmt: skip


if __name__ == "__main__":
    main()
