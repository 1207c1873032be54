"""What a report says -> one HTML file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_mask.cli.answer import plain

_LONGEST_CARD = 200_000  # characters
_ABOVE_CARDS = 3  # level of the heading above a card


@dataclass(frozen=True)
class Table:
    """A table, the first column of which names the rows.

    Attributes:
        caption: what it holds.
        heads: of the columns.
        rows: of texts; those that begin with a digit stand on the right.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A chart and its numbers.

    Attributes:
        title: of the chart.
        says: how to read it.
        svg: the chart, as `charts.svg` draws it; empty for a table alone.
        table: the same in numbers.
    """

    title: str
    says: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: of its heading, for links.
        title: the heading.
        text: what stands below it.
        figures: its charts.
        html: what is already HTML and safe, such as a card.
    """

    id: str
    title: str
    text: str = ""
    figures: Sequence[Figure] = field(default_factory=list)
    html: str = ""


def page(title: str, facts: Table, sections: Sequence[Section], version: str) -> str:
    """Return the page. Every text is escaped, but for charts and `Section.html`.

    Args:
        title: of the page.
        facts: its first table.
        sections: what follows, in order.
        version: of the package, for the foot of the page.

    Raises:
        ImportError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("a report is written with Jinja2: pip install 'peft-mask[report]'.") from error
    source = Path(__file__).with_name("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = plain
    template = environment.from_string(source)
    return template.render(title=title, facts=facts, sections=sections, version=version)


def card_html(text: str) -> str:
    """Return a model card, which a stranger wrote, as HTML: no HTML of its own, no pictures, links to the web alone.

    Args:
        text: `README.md` with its metadata or without.

    Raises:
        ImportError: markdown-it is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("a report shows cards with markdown-it-py: pip install 'peft-mask[report]'.") from error
    body = re.sub(r"\A---\n.*?\n---\n", "", text[:_LONGEST_CARD].replace("\r\n", "\n"), count=1, flags=re.DOTALL)
    body = "\n".join(plain(line.replace("\t", "    ")) for line in body.split("\n"))
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").disable("image")
    for kind in ("html_block", "html_inline"):
        reader.renderer.rules[kind] = _shown  # type: ignore[attr-defined]
    reader.validateLink = _leads_to_the_web  # type: ignore[method-assign]
    tokens = reader.parse(body)
    level, first = _ABOVE_CARDS, min((token.tag for token in tokens if token.type == "heading_open"), default="h1")
    for token in tokens:
        if token.type == "heading_open":  # below those of the page, and no step is left out on the way down
            level = min(int(token.tag[1]) - int(first[1]) + _ABOVE_CARDS + 1, level + 1, 6)
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{level}"
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("rel", "noopener noreferrer nofollow")
    rendered: Any = reader.renderer.render(tokens, reader.options, {})
    return str(rendered)


def _shown(tokens: Sequence[Any], place: int, *_: Any) -> str:
    """What is shown of HTML in a card: its letters, without comments, which nobody is meant to read."""
    from markupsafe import escape

    text = str(escape(re.sub(r"<!--.*?-->", "", tokens[place].content, flags=re.DOTALL)))
    if tokens[place].type == "html_inline":
        return text
    return f"<p>{text.strip()}</p>\n" if text.strip() else ""


def _leads_to_the_web(url: str) -> bool:
    return url.lower().startswith(("https://", "http://"))
