"""Models and tokenizers by name; what cannot be had is named."""

from __future__ import annotations

import json
from typing import Any


def pretrained(kind: Any, name: str, **settings: Any) -> Any:
    """Load what `kind`, an auto class, makes of a folder or a model of the Hub.

    Raises:
        ValueError: if there is no such thing.
    """
    try:
        return kind.from_pretrained(name, **settings)
    except OSError as error:
        raise ValueError(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from None


def told(text: str | None) -> dict[str, Any]:
    """Return what `--model_init_kwargs` says.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'--model_init_kwargs {text}: expected a JSON object, such as \'{{"dtype": "bfloat16"}}\'.')
    return found
