"""The site that `make docs` builds: links lead somewhere, nothing comes from elsewhere, examples are shown as code."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs, which builds the site, is not installed: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'")

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://example.org/us/peft-mask"


def script(name):
    """A module of docs/site/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = script("hooks")
docstrings = script("docstrings")


@pytest.mark.parametrize(
    ("document", "target", "place"),
    [
        ("README.md", "docs/training.md#how-long", "training.md#how-long"),
        ("docs/training.md", "budget.md", "budget.md"),
        ("docs/hub.md", "../README.md", "index.md"),
        ("docs/hub.md", "../examples/README.md#files", "examples.md#files"),
        ("README.md", "SECURITY.md", "security.md"),
        ("docs/chat.md", "../examples/sft.py", f"{REPOSITORY}/blob/main/examples/sft.py"),
        ("docs/several-processes.md", "../examples", f"{REPOSITORY}/tree/main/examples"),
        ("README.md", "docs/images/idea.svg", "images/idea.svg"),
        (
            "benchmarks/accuracy/results/README.md",
            "accuracy.png",
            "images/benchmarks/accuracy/results/accuracy.png",
        ),
        ("docs/training.md", "#how-long", "#how-long"),
        ("docs/training.md", "https://example.org/a", "https://example.org/a"),
    ],
)
def test_a_link_leads_to_the_page_or_to_the_file_in_the_repository(document, target, place):
    assert hooks.target_on_site(target, document, REPOSITORY) == place


def test_a_link_to_what_is_not_there_is_refused():
    with pytest.raises(PluginError, match=r"docs/hub\.md: the link '\.\./gone\.md' leads to 'gone\.md', which is not"):
        hooks.target_on_site("../gone.md", "docs/hub.md", REPOSITORY)


def test_links_are_turned_in_text_and_not_in_code():
    text = "[a](x)\n\n```python\nf[0](x)\n```\n\n[b](x) and `[c](x)`\n"
    turned = hooks.with_links(text, lambda target: target.upper())
    assert turned == text.replace("[a](x)", "[a](X)").replace("[b](x)", "[b](X)")


@pytest.mark.parametrize("docstring", ["Do it.\n\nExample:\n    >>> 1\n    1", "Do it.\n\n>>> 1\n1"])
def test_examples_are_the_section_that_griffe_knows(docstring):
    assert docstrings.with_examples(docstring) == "Do it.\n\nExamples:\n    >>> 1\n    1"


def test_documents_that_a_docstring_names_are_links():
    assert docstrings.with_documents("so (docs/how-masks-learn.md).") == "so ([How masks learn](how-masks-learn.md))."
    with pytest.raises(PluginError, match=r"a docstring names 'docs/gone\.md', which is not there"):
        docstrings.with_documents("see docs/gone.md")


def test_short_code_is_marked_and_other_code_left_alone():
    long = f"<code>{'x' * 40}</code>"
    html = f"<p><code>--help</code> {long}</p><pre><code><span>a</span></code></pre>"
    assert hooks.on_page_content(html, None, None, None) == html.replace("<code>--", '<code class="short">--')


def test_cells_of_much_text_are_marked():
    html = f"<tr><td>{'a' * 31}</td><td><b>short</b></td></tr>"
    assert hooks.on_page_content(html, None, None, None) == html.replace("<td>a", '<td class="long">a')


class Resources(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in {"script", "img", "iframe"}:
            self.found.append(named.get("src"))
        if tag == "link" and named.get("rel") not in {"canonical", "next", "prev"}:
            self.found.append(named.get("href"))


def make_docs(source, folder):
    """Build a site into a folder by the command that `make docs` has."""
    (arguments,) = re.findall(r"\$\(RUN\) (-m mkdocs .+)$", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    return subprocess.run(
        [sys.executable, *arguments.split(), "--site-dir", str(folder)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    run = make_docs(ROOT, folder)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("target", ["#nowhere", "other.md#nowhere", "nowhere.md"])
def test_a_link_that_leads_nowhere_stops_the_site(tmp_path, target):
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    validation = re.search(r"^validation:\n(?:  .+\n)+", settings, flags=re.MULTILINE)[0]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: s\ntheme: null\n{validation}", "utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n", "utf-8")
    for link, status in (("other.md#other", 0), (target, 1)):
        (tmp_path / "docs" / "index.md").write_text(f"[a link]({link})\n", "utf-8")
        assert make_docs(tmp_path, tmp_path / "site").returncode == status


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 30
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.found, page.name
        assert [link for link in resources.found if link and re.match(r"(\w+:)?//", link)] == [], page.name
    styles = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", styles) == []


def test_every_document_is_a_page_whose_text_can_be_searched(site):
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"].partition("#")[0] for entry in entries if entry["text"]}
    documents = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert documents - found == set()
    assert any("create_mask_optimizer" in entry["text"] for entry in entries)


def test_the_reference_names_whatever_users_import(site):
    import peft_mask

    pages = "".join((site / name).read_text(encoding="utf-8") for name in ("reference.html", "configuration.html"))
    documented = set(re.findall(r'id="(peft_mask[\w.]*)"', pages))
    constants = {"HEAD_LR", "MASK_LR"}
    assert {f"peft_mask.{name}" for name in set(peft_mask.__all__) - constants} - documented == set()
