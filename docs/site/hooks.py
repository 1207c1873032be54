"""What mkdocs needs to know of this repository: pages that lie outside `docs/`, and links that lead out of it.

A link in a document is written as it works in the repository. On the site it leads to the same page there or, where the
site has no such page, to the file in the repository, whose address is `extra.repository` in `mkdocs.yml`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# page of the site -> its document outside docs/
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
    "accuracy.md": "benchmarks/accuracy/results/README.md",
    "examples.md": "examples/README.md",
    "example-data.md": "examples/data/README.md",
}
_PAGES = {document: page for page, document in OUTSIDE.items()}
_IMAGES = {".png", ".svg"}

_LINK = re.compile(r"(?<!`)(?P<text>\[[^\]]*\]\()(?P<target>[^)\s]+)(?=\))")
_SHORT_CODE = re.compile(r"<code>(?=[^<]{1,28}</code>)")
_CELL = re.compile(r"<td>(.*?)</td>", flags=re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_FENCED = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1 *$", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents from outside `docs/`, and the images that documents show from there."""
    for page, document in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    documents = [*OUTSIDE.values(), *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for document in documents:
        if (ROOT / document).is_file():
            text = (ROOT / document).read_text(encoding="utf-8")
            for match in _LINK.finditer(text):
                path = _path(document, match["target"])
                place = _image(path)
                if place and not path.startswith("docs/") and files.get_file_from_path(place) is None:
                    files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that work in the repository into links that work on the site."""
    document = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return with_links(markdown, lambda target: target_on_site(target, document, config.extra["repository"]))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark for the style: short code, which is not broken over lines, and cells of much text, which need some width."""
    html = _SHORT_CODE.sub('<code class="short">', html)
    return _CELL.sub(
        lambda cell: cell[0].replace("<td>", '<td class="long">', 1) if _is_long(cell[1]) else cell[0], html
    )


def _is_long(cell: str) -> bool:
    return len(_TAG.sub("", cell)) > 30


def with_links(markdown: str, change: Callable[[str], str]) -> str:
    """Put what `change` makes of it in the place of every link's target, but for those in code blocks."""
    done, parts = 0, []
    for fenced in (*_FENCED.finditer(markdown), None):
        end = len(markdown) if fenced is None else fenced.start()
        parts.append(_LINK.sub(lambda match: match["text"] + change(match["target"]), markdown[done:end]))
        if fenced is not None:
            parts.append(fenced.group())
            done = fenced.end()
    return "".join(parts)


def target_on_site(target: str, document: str, repository: str) -> str:
    """Return where a link of this document, a path in the repository, leads on the site.

    Raises:
        PluginError: if there is no such file in the repository.
    """
    if target.startswith("#") or re.match(r"[a-z]+:", target):
        return target
    path, anchor = _path(document, target), target.partition("#")[2]
    if not (ROOT / path).exists():
        raise PluginError(f"{document}: the link '{target}' leads to '{path}', which is not there; mend it.")
    if path in _PAGES:
        place = _PAGES[path]
    elif path.startswith("docs/") and (ROOT / path).is_file():
        place = path.removeprefix("docs/")
    elif (image := _image(path)) is not None:
        place = image
    else:
        place = f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return f"{place}#{anchor}" if anchor else place


def _path(document: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), target.partition("#")[0]))


def _image(path: str) -> str | None:
    return f"images/{path}" if posixpath.splitext(path)[1] in _IMAGES else None
