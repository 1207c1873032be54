"""What a command has found: data for machines, text for people, and the number that the process ends with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 1500  # characters of a message
OK, NO, FAILED = 0, 1, 2  # exit codes: done, or yes; a "no" or "different"; not done


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    Attributes:
        data: what `--json` prints, one object.
        text: what is printed without it.
        code: what the process ends with.
    """

    data: Mapping[str, Any]
    text: str
    code: int = OK

    def json(self) -> str:
        """Return the data as JSON; numbers that are not finite, which JSON lacks, as null."""
        return json.dumps(_finite(self.data), indent=2, ensure_ascii=True)


def plain(value: object) -> str:
    r"""Return a text of which nothing can move the cursor or hide: adapters, and names in them, come from strangers.

    >>> plain("layer\x1b[2J")
    'layer\\x1b[2J'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in str(value))


def one_line(value: object) -> str:
    """Return a message as one line of printable characters; of a very long one the beginning."""
    line = plain(" ".join(str(value).split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def size(count: float) -> str:
    """Return a number of bytes for people.

    >>> size(67_551), size(900)
    ('67.6 kB', '900 B')
    """
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:,.1f} {unit}"
    return f"{count:,.0f} B"


def percent(share: float) -> str:
    """Return a share in per cent; "-" for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.3f} %"


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table in columns: numbers on the right, all else on the left.

    Args:
        rows: of the same keys, which are the heads of the columns.
    """
    if not rows:
        return "none"
    heads = list(rows[0])
    cells = [heads, *([_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(heads))]
    right = [all(_is_number(row[head]) for row in rows) for head in heads]
    lines = [
        "  ".join(
            cell.rjust(width) if on_the_right else cell.ljust(width)
            for cell, width, on_the_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def facts(pairs: Mapping[str, object]) -> str:
    """Return names and values, one pair a line; those of None are left out."""
    width = max(len(name) for name in pairs) + 2
    return "\n".join(f"{name:<{width}}{plain(value)}" for name, value in pairs.items() if value is not None)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else plain(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and bool(re.fullmatch(r"[\d,.]+( %)?|-", value)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
