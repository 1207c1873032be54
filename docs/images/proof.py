"""Draws proof.svg from the rows of reproduction/results/controls.json: `python docs/images/proof.py`.

As many weights are off in each matrix, those that were learned or others. Bars start at chance; whiskers are one
standard deviation between seeds.
"""

import json
from pathlib import Path

INK, FAINT, ACCENT, PAPER = "#1d2733", "#5c6b7a", "#b3541e", "#ffffff"
LEFT, TOP, STEP, BAR, WIDTH = 20, 88, 52, 22, 480  # so narrow that it can be read on a phone
CHANCE, MOST, LENGTH = 0.5, 0.9, 440
RESULTS = Path(__file__).parents[2] / "reproduction" / "results" / "controls.json"

BARS = (
    ("none: every weight kept", "every weight kept"),
    ("shuffled", "0.5 % off, at random"),
    ("shuffled among candidates", "0.5 % off, at random among the large"),
    ("learned", "0.5 % off, the learned ones"),
)


def drawn() -> str:
    """The picture, as SVG."""
    result = json.loads(RESULTS.read_text("utf-8"))
    rows = {row["mask"]: row for row in result["rows"] if row["recipe"] == "default"}
    bottom = TOP + len(BARS) * STEP
    about = f"SST-2, {result['examples']} sentences, {result['seeds']} seeds; for each mask a head fitted anew"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 16}" width="{WIDTH}" role="img">',
        "<title>Accuracy with the learned mask, with as many zeros elsewhere, and with none</title>",
        f'<rect width="{WIDTH}" height="{bottom + 16}" rx="8" fill="{PAPER}"/>',
        f'<g font-family="sans-serif" fill="{INK}">',
        '<text x="20" y="30" font-size="18" font-weight="bold">What was learned is which weights are off</text>',
        f'<text x="20" y="51" font-size="14" fill="{FAINT}">{about}</text>',
    ]
    for number, (mask, about) in enumerate(BARS):
        figure, spread = rows[mask]["head refitted"], rows[mask]["head refitted: deviation"]
        color, y = ACCENT if mask == "learned" else FAINT, TOP + number * STEP
        low, end, high = (at(value) for value in (figure - spread, figure, figure + spread))
        middle = y + BAR / 2
        parts.append(f'<text x="{LEFT}" y="{y - 7}" font-size="15">{about}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" fill="{color}"/>')
        if spread:
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="{INK}" stroke-width="2"/>')
        told = f'<text x="{max(end, high) + 8:.1f}" y="{middle + 5}" font-size="15">{100 * figure:.1f} %</text>'
        parts.append(told)
    parts.append(f'<text x="{LEFT}" y="{bottom}" font-size="14" fill="{FAINT}">Bars start at chance, 50 %.</text>')
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def at(accuracy: float) -> float:
    """Where an accuracy ends on the picture."""
    return LEFT + LENGTH * (accuracy - CHANCE) / (MOST - CHANCE)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawn(), encoding="utf-8")
