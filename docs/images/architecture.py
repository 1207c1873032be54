"""Draws architecture.svg from the imports of the package: `python docs/images/architecture.py`.

A box a room, in the order of the import contract in pyproject.toml, with the docstring of the room; an arrow for each
room that another one imports from. `tests/project/test_architecture.py` fails when the picture is older than the code.
"""

import ast
import textwrap
from html import escape
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peft_mask"
BOX, HEIGHT, GAP, REACH = (
    560,
    72,
    26,
    26,
)  # width and height of a box, between boxes, and of an arc for each room it spans
INK, PALE, ACCENT, FAINT = "#1d2733", "#eef2f6", "#b3541e", "#d9b9a6"


def rooms() -> list[str]:
    """The rooms from the top, as the contract lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["peft_mask"])
    return [room for layer in layers for room in layer.split(" | ")]  # rooms beside each other: one below the other


def imports() -> set[tuple[str, str]]:
    """Which room imports from which other."""
    found = set()
    for path in sorted(PACKAGE.glob("*/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_mask."):
                found.add((path.parent.name, node.module.split(".")[1]))
    return {(room, other) for room, other in found if room != other}


def drawn() -> str:
    """The picture, as SVG."""
    order = rooms()
    tops = {room: 12 + place * (HEIGHT + GAP) for place, room in enumerate(order)}
    width, height = BOX + 40 + REACH * (len(order) - 3), tops[order[-1]] + HEIGHT + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{ACCENT}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<g font-family="sans-serif" fill="{INK}">',
    ]
    far_first = sorted(imports(), key=lambda pair: (order.index(pair[0]) - order.index(pair[1]), pair))
    for above, below in far_first:
        parts.append(arrow(tops, order.index(below) - order.index(above), above, below))
    for room, top in tops.items():
        parts += box(room, top)
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def box(room: str, top: int) -> list[str]:
    says = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))) or ""
    lines = textwrap.wrap(says.partition("\n\n")[0].replace("`", ""), 76)[:2]
    return [
        f'<rect x="12" y="{top}" width="{BOX}" height="{HEIGHT}" rx="8" fill="{PALE}" stroke="{INK}"/>',
        f'<text x="28" y="{top + 25}" font-size="16" font-weight="bold">{room}/</text>',
        *(f'<text x="28" y="{top + 44 + 17 * i}" font-size="13">{escape(line)}</text>' for i, line in enumerate(lines)),
    ]


def arrow(tops: dict[str, int], span: int, above: str, below: str) -> str:
    stroke = f'fill="none" stroke="{ACCENT if span == 1 else FAINT}" stroke-width="1.5" marker-end="url(#tip)"'
    if span == 1:
        x, start = 12 + BOX // 2, tops[above] + HEIGHT
        return f'<path d="M{x} {start}V{tops[below] - 2}" {stroke}/>'
    right, reach = 12 + BOX, 14 + REACH * (span - 1)
    start, end = tops[above] + HEIGHT // 2 + 4 * span, tops[below] + HEIGHT // 2 - 4 * span
    return f'<path d="M{right} {start}C{right + reach} {start} {right + reach} {end} {right + 2} {end}" {stroke}/>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawn(), "utf-8")
