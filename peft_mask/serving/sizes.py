"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate(["", "k", "m", "g", "t"])}}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(["k", "m", "g", "t"], 1)}


def bytes_of(size: int | str) -> int:
    """Return a number of bytes that may be written as "500MB", "2GB" or "1.5GiB".

    Raises:
        ValueError: it means no number of bytes above 0.

    >>> bytes_of("2GB"), bytes_of("0.5KiB"), bytes_of(10)
    (2000000000, 512, 10)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or (number := int(float(found[1]) * unit)) < 1:
        raise ValueError(f"expected a number of bytes like '2GB' or 500_000_000, got {size!r}.")
    return number
