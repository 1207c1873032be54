"""Checks of a configuration's fields: what comes from a file may be of any type."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


def check_choice(name: str, value: Any, choices: tuple[str, ...], also: str = "") -> None:
    """Raise a `ValueError` if a field is none of its choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}{also and ', ' + also}, got {value!r}.")


def check_number(
    name: str, value: Any, above: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> None:
    """Raise a `ValueError` if a field is no finite number, or out of its range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < below or not value <= most or not _is_finite(value):
        bounds = f" greater than {above:g}" if above > -math.inf else ""
        bounds += f" and less than {below:g}" if below < math.inf else ""
        bounds += f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Raise a `ValueError` if a field is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_text(name: str, value: Any) -> None:
    """Raise a `ValueError` if a field is neither a string nor None."""
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"{name} must be a string or None, got {value!r}.")


def check_names(name: str, value: Any, *, single: bool = False) -> None:
    """Raise a `ValueError` if a field is no list of names, nor None, nor, where that is allowed, a single string."""
    if value is None or (single and isinstance(value, str)):
        return
    names = isinstance(value, Collection) and not isinstance(value, (str, bytes, dict))
    if not names or not all(isinstance(item, str) and item for item in value):
        one = "a string, " if single else ""
        raise ValueError(f"{name} must be {one}a list of names or None, got {value!r}.")


def check_indices(name: str, value: Any, least: int | None = None) -> None:
    """Raise a `ValueError` if a field is no list of integers of 64 bits, from `least` on."""
    low = -(1 << 63) if least is None else least
    some = isinstance(value, Collection) and not isinstance(value, (str, bytes, dict))
    if not some or not all(type(item) is int and low <= item < 1 << 63 for item in value):
        bound = "" if least is None else f" from {least} on"
        raise ValueError(f"{name} must be a list of integers{bound}, got {value!r}.")


def check_checksums(name: str, value: Any) -> None:
    """Raise a `ValueError` if a field is neither what saving writes of a file's checksums nor None."""
    sums = value.get("tensors") if isinstance(value, dict) else None
    texts = [value.get("records"), *sums.values()] if isinstance(sums, dict) else [None]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be what saving wrote or None, got {value!r}.")


def places_of(names: Any) -> dict[int, str] | None:
    """Return what `id2label` says, its places as integers, in their order: JSON makes strings of them.

    Raises:
        ValueError: it is neither None nor a dictionary of strings by 0, 1, 2, ...
    """
    if names is None:
        return None
    if isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values()):
        places = {f"{place}": name for place, name in names.items()}
        wanted = [f"{place}" for place in range(len(places))]
        if places.keys() == set(wanted):
            return {place: places[key] for place, key in enumerate(wanted)}
    raise ValueError(f"id2label must be a dictionary of strings by 0, 1, 2, ... or None, got {names!r}.")


def names_given(id2label: Mapping[int, str]) -> tuple[str, ...] | None:
    """Return the names of labels in the order of the logits; None where they are transformers' for want of others."""
    named = any(name != f"LABEL_{place}" for place, name in id2label.items())
    return tuple(id2label.values()) if named else None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
