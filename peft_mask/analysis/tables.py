"""Rows of figures -> a table to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table: integers with commas, other numbers with four digits, from 1,000 one decimal.

    Args:
        rows: what the analyses return; the columns are the keys of all rows in the order they appear.

    Example:
        >>> print(markdown([{"tasks": 1000, "ratio": 3.69913}]))
        | tasks | ratio |
        | --- | --- |
        | 1,000 | 3.699 |
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
