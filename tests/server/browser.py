"""A page as Chromium shows it, without a window: what is in its document once its scripts have run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120  # seconds, many times what any page takes on a slow machine

_OPTIONS = (
    "--headless",
    "--no-sandbox",  # containers run it as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",  # milliseconds of the page's clock, which stands still while it waits for answers
)
_VOID = {"br", "hr", "img", "input", "link", "meta"}  # elements without an end


@dataclass
class Element:
    """An element of a document.

    Attributes:
        name: of its kind.
        attributes: by name; the value of one without a value is "".
        children: elements and texts.
    """

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def all(self, name: str | None = None, **attributes: str) -> list[Element]:
        """Return the elements within, of a kind and with these attributes (`class_` among several), in their order."""
        return [each for each in self._within() if name in (None, each.name) and each._has(attributes)]

    def one(self, name: str | None = None, **attributes: str) -> Element:
        """Return the only such element."""
        found = self.all(name, **attributes)
        assert len(found) == 1, f"{len(found)} elements {name or ''} {attributes}"
        return found[0]

    @property
    def text(self) -> str:
        """What stands in it for a reader, with single spaces."""
        return " ".join(self._text().split())

    def _text(self) -> str:
        if self.name in ("script", "style") or "hidden" in self.attributes:
            return ""
        return "".join(each if isinstance(each, str) else each._text() for each in self.children)

    def _within(self) -> Iterator[Element]:
        for each in self.children:
            if isinstance(each, Element):
                yield each
                yield from each._within()

    def _has(self, attributes: dict[str, str]) -> bool:
        own = self.attributes
        return all(
            value in own.get("class", "").split() if name == "class_" else own.get(name) == value
            for name, value in attributes.items()
        )


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.document = Element("document")
        self._open = [self.document]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(made)
        if tag not in _VOID:
            self._open.append(made)

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop().name != tag:
            pass

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse(html: str) -> Element:
    """Return a document as elements."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.document


def shown(url: str) -> Element:
    """Return the document at an address after its scripts have run and its requests were answered."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}", "--dump-dom", url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr
    return parse(run.stdout)
