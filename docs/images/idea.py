"""Draws idea.svg, the first picture of the README: `python docs/images/idea.py`.

Three grids: a pretrained matrix, its mask, and the matrix that the layer computes with. More cells are off than a mask
has by default, or none would be.
"""

import random
from pathlib import Path

CELL, ROWS, COLUMNS = 20, 8, 11
INK, FAINT, ACCENT, PAPER = "#1d2733", "#5c6b7a", "#b3541e", "#ffffff"
LEFT, TOP, STEP = 30, 62, 300
WIDTH, HEIGHT = 2 * LEFT + 2 * STEP + COLUMNS * CELL, 306

GRIDS = (
    ("W", "pretrained, never changed"),
    ("M", "learned: 1 keeps, 0 switches off"),
    ("W ⊙ M", "what the layer computes with"),
)


def drawn() -> str:
    """The picture, as SVG."""
    draw = random.Random(3)
    places = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    weights = {place: abs(draw.gauss(0, 1)) for place in places}
    large = sorted(places, key=lambda place: -weights[place])[: len(places) // 3]
    off = set(draw.sample(large, 5))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>A weight matrix times a mask of zeros and ones is what the layer computes with</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        f'<g font-family="sans-serif" fill="{INK}" text-anchor="middle">',
    ]
    for number, (name, what) in enumerate(GRIDS):
        left = LEFT + number * STEP
        middle = left + COLUMNS * CELL / 2
        parts.append(f'<text x="{middle}" y="30" font-size="20" font-weight="bold">{name}</text>')
        parts.append(f'<text x="{middle}" y="50" font-size="13" fill="{FAINT}">{what}</text>')
        for row, column in places:
            cell = (row, column)
            shade = 0.0 if number == 1 else min(1.0, 0.08 + 0.32 * weights[cell])
            if number and cell in off:
                parts += switched_off(left, row, column)
            else:
                parts.append(square(left, row, column, INK, shade))
    below = TOP + ROWS * CELL
    for number, sign in enumerate(("⊙", "=")):
        x = LEFT + COLUMNS * CELL + number * STEP + (STEP - COLUMNS * CELL) / 2
        parts.append(f'<text x="{x}" y="{TOP + ROWS * CELL / 2 + 10}" font-size="30">{sign}</text>')
    middle = LEFT + STEP + COLUMNS * CELL / 2
    parts.append(f'<path d="M{middle} {below + 8}v22m-5 -7l5 7l5 -7" fill="none" stroke="{ACCENT}" stroke-width="2"/>')
    saved = "saved: where the zeros are. 68 kB for a model of 22 million weights"
    parts.append(f'<text x="{middle}" y="{below + 50}" font-size="15" fill="{ACCENT}">{saved}</text>')
    tasks = "another task is another mask of the same W"
    parts.append(f'<text x="{middle}" y="{below + 70}" font-size="13" fill="{FAINT}">{tasks}</text>')
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def square(left: int, row: int, column: int, color: str, opacity: float) -> str:
    """A cell, filled as strongly as its weight is large."""
    place = f'x="{left + column * CELL}" y="{TOP + row * CELL}" width="{CELL - 2}" height="{CELL - 2}"'
    return f'<rect {place} fill="{color}" fill-opacity="{opacity:.2f}" stroke="{INK}" stroke-opacity="0.15"/>'


def switched_off(left: int, row: int, column: int) -> list[str]:
    """A cell that is zero."""
    x, y = left + column * CELL + (CELL - 2) / 2, TOP + row * CELL + (CELL - 2) / 2
    zero = f'<text x="{x}" y="{y + 5}" font-size="13" font-weight="bold" fill="{ACCENT}">0</text>'
    return [square(left, row, column, PAPER, 1.0), zero]


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawn(), encoding="utf-8")
