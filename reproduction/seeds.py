"""One figure of several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import mean, stdev
from typing import Any


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Two columns of a table: the mean, called `name`, and the standard deviation, which one value has not.

    Both are None if a value is NaN, which JSON does not have.

    Example:
        >>> over_seeds("test", [0.5, 0.7])
        {'test': 0.6, 'deviation': 0.1414}
    """
    if any(map(isnan, values)):
        return {name: None, "deviation": None}
    return {name: round(mean(values), 4), "deviation": round(stdev(values), 4) if len(values) > 1 else None}


def bars(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The deviations of these rows, to be drawn; None if they are of one seed."""
    found = [row["deviation"] for row in rows]
    return None if None in found else found
