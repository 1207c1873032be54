"""What Griffe, which reads the docstrings of the reference, has to be told of ours."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

DOCUMENTS = Path(__file__).parents[1]
_DOCUMENT = re.compile(r"\bdocs/([\w-]+)\.md\b")
_PROMPT = re.compile(r"(?m)^>>> (?:.+\n?)+")


class Examples(griffe.Extension):
    """Show `Example:`, and a prompt without any heading, as code: Griffe knows `Examples:` alone. Link documents."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_documents(with_examples(obj.docstring.value))


def with_examples(text: str) -> str:
    """Return the docstring with the sections of examples that Griffe knows."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _PROMPT.sub(lambda prompt: "Examples:\n" + textwrap.indent(prompt.group(), "    "), text)


def with_documents(text: str) -> str:
    """Return the docstring with links to the pages of the site for the documents that it names.

    Raises:
        PluginError: if it names one that is not there.
    """
    return _DOCUMENT.sub(_link, text)


def _link(named: re.Match[str]) -> str:
    document = DOCUMENTS / f"{named[1]}.md"
    if not document.is_file():
        raise PluginError(f"a docstring names '{named[0]}', which is not there; mend it.")
    title = document.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"[{title}]({document.name})"
