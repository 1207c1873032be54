"""What Griffe, which reads the docstrings of the reference, has to be told of ours."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_PROMPT = re.compile(r"(?m)^>>> (?:.+\n?)+")


class Examples(griffe.Extension):
    """Show `Example:`, and a prompt without any heading, as code: Griffe knows `Examples:` alone."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_examples(obj.docstring.value)


def with_examples(text: str) -> str:
    """Return the docstring with the sections of examples that Griffe knows."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _PROMPT.sub(lambda prompt: "Examples:\n" + textwrap.indent(prompt.group(), "    "), text)
