"""Everything the documents claim in code is run: fenced blocks, docstring examples, make targets, links.

The Python blocks of one file run top to bottom in one namespace, in an empty directory. A block that cannot run here
(it needs a GPU, the Hub, an hour) has `<!-- not run: reason -->` on the line before its fence, and must still compile.
A block of text after `<!-- output -->` shows what the Python block before it prints. `<!-- output, numbers to 0.05 -->`
lets numbers differ by five per cent, for what depends on the processor.
"""

import contextlib
import doctest
import importlib
import importlib.util
import io
import json
import math
import pkgutil
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.versions import LOADS_BY_NAME, LOADS_HEADS, MANAGES_ADAPTERS, RUNS_ON_META

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LANGUAGES = {"python", "bash", "text", "json", "yaml", "bibtex"}

_FENCE = re.compile(r"^ {0,3}(?P<marks>```+|~~~+)(?P<language>[^`]*)$")
_NOT_RUN = re.compile(r"^ {0,3}<!-- not run: (?P<reason>\S.*?) -->$")
_OUTPUT = re.compile(r"^ {0,3}<!-- output(?:, numbers to (?P<tolerance>0\.\d+))? -->$")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    path: Path
    line: int  # of the block's first line of code, counted from 1
    language: str
    source: str
    not_run: str | None  # the reason
    printed: float | None = None  # by the Python block before: how far numbers may differ from these, relatively

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path}:{self.line}"

    def compiled(self):
        # the empty lines in front make tracebacks name the document's own line
        return compile("\n" * (self.line - 1) + self.source, str(self.path), "exec")


def blocks_of(path: Path) -> list[Block]:
    blocks: list[Block] = []
    opening: re.Match[str] | None = None  # of the block we are in
    previous = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if opening is None:
            opening = _FENCE.match(line)
            start, code, reason, output = number + 1, [], _NOT_RUN.match(previous), _OUTPUT.match(previous)
        elif line.strip().startswith(opening["marks"]) and not line.strip(" `~"):
            source = "".join(f"{text}\n" for text in code)
            printed = float(output["tolerance"] or 0) if output else None
            language = opening["language"].strip()
            blocks.append(Block(path, start, language, source, reason["reason"] if reason else None, printed))
            opening = None
        else:
            code.append(line)
        previous = line
    if opening is not None:
        raise ValueError(f"{path.name}:{start - 1}: this code block is never closed")
    return blocks


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def _select(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_block_says_its_language():
    assert {block.where: block.language for block in BLOCKS if block.language not in LANGUAGES} == {}


def test_the_readme_and_the_documents_have_blocks_that_run():
    run = [block for block in _select("python") if not block.not_run]
    assert len([block for block in run if block.path.name == "README.md"]) > 0
    assert len(run) > 0


@pytest.mark.parametrize("path", sorted({b.path for b in _select("python")}), ids=lambda path: path.name)
def test_python_blocks_run_top_to_bottom(path, tmp_path, monkeypatch):
    if path.name == "transformers.md" and not (LOADS_BY_NAME and LOADS_HEADS and MANAGES_ADAPTERS):
        pytest.skip("this transformers does less, or warns")
    if path.name in {"classify.md", "embed.md"} and not MANAGES_ADAPTERS:
        pytest.skip("this transformers asks for another PEFT in add_adapter")
    if path.name == "memory.md" and not RUNS_ON_META:
        pytest.skip("this transformers' Llama does not run without weights")
    monkeypatch.chdir(tmp_path)
    run_blocks([block for block in BLOCKS if block.path == path])


def run_blocks(blocks: list[Block]) -> None:
    """Run the Python blocks in one namespace, and compare what they print with the blocks that show it."""
    namespace = {"__name__": "__main__"}
    written = ""
    for block in blocks:
        if block.language == "python":
            code = block.compiled()
            if not block.not_run:
                with contextlib.redirect_stdout(io.StringIO()) as stream:
                    exec(code, namespace)
                written = stream.getvalue()
        elif block.printed is not None:
            assert is_shown(written, block.source, block.printed), f"{block.where}: the block above prints\n{written}"


def is_shown(written: str, shown: str, tolerance: float) -> bool:
    """Whether two texts are the same, but for numbers that differ by so much of the shown one, and blanks."""
    texts = [re.sub(r" +", " ", _NUMBER.sub("#", text)).strip() for text in (written, shown)]
    numbers = [[float(number.replace(",", "")) for number in _NUMBER.findall(text)] for text in (written, shown)]
    return texts[0] == texts[1] and all(
        math.isclose(got, wanted, rel_tol=0, abs_tol=tolerance * wanted) for got, wanted in zip(*numbers, strict=True)
    )


def test_every_shown_output_follows_the_block_that_prints_it():
    for path in DOCUMENTS:
        blocks = [block for block in BLOCKS if block.path == path]
        for before, block in zip([None, *blocks], blocks, strict=False):
            if block.printed is not None:
                assert block.language == "text", block.where
                assert before is not None, block.where
                assert (before.language, before.not_run) == ("python", None), block.where


def test_json_blocks_parse():
    for block in _select("json"):
        try:
            json.loads(block.source)
        except ValueError as error:
            pytest.fail(f"{block.where}: {error}")


def test_yaml_blocks_are_objects():
    assert [block.where for block in _select("yaml") if not isinstance(yaml.safe_load(block.source), dict)] == []


def test_shell_blocks_parse_and_name_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for block in _select("bash"):
        checked = subprocess.run(["bash", "-n"], input=block.source, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, f"{block.where}: {checked.stderr}"
        named = set(re.findall(r"^\s*make (?:\w+=\S+ )*([a-z-]+)", block.source, flags=re.MULTILINE))
        assert named <= targets, f"{block.where}: the Makefile has no {named - targets}"
        modules = r"python3? -m ((?:attacks|examples|benchmarks|reproduction|peft_mask)[\w.]*)"
        for module in re.findall(modules, block.source):
            assert importlib.util.find_spec(module), f"{block.where}: there is no module {module}"
        for script in re.findall(r"python3? ([\w./-]+\.py)", block.source):
            assert (ROOT / script).exists(), f"{block.where}: there is no file {script}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(path):
    targets = [match["target"].split("#")[0] for match in _LINK.finditer(path.read_text(encoding="utf-8"))]
    missing = [t for t in targets if t and ":" not in t and not (path.parent / t).exists()]
    assert missing == []


def _modules() -> list[str]:
    import peft_mask

    return ["peft_mask", *(module.name for module in pkgutil.walk_packages(peft_mask.__path__, "peft_mask."))]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples_are_true(name, tmp_path, monkeypatch):
    if name == "peft_mask.training.memory" and not RUNS_ON_META:
        pytest.skip("this transformers' Llama does not run without weights")
    if name == "peft_mask.layers.correction_triton":  # has no examples
        pytest.importorskip("triton", reason="triton is not installed, and imported by who asks for it alone")
    if name == "peft_mask.integrations.axolotl":  # has no examples
        pytest.importorskip("axolotl", reason="axolotl is not installed, which alone imports its plugin")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


DOCUMENT = """\
<!-- not run: needs a GPU -->
```python
raise RuntimeError
```

~~~text
```not a block
~~~

```python
x = 1

assert x == 1
```
"""


def test_the_reader_of_documents_finds_blocks_their_lines_and_reasons(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT)
    found = [(block.line, block.language, block.source, block.not_run) for block in blocks_of(path)]
    assert found == [
        (3, "python", "raise RuntimeError\n", "needs a GPU"),
        (7, "text", "```not a block\n", None),
        (11, "python", "x = 1\n\nassert x == 1\n", None),
    ]


@pytest.mark.parametrize(
    ("shown", "tolerance", "same"),
    [
        ("loss 1.00, 1,000 bytes\n", 0.0, True),
        ("loss 1.04, 1,000 bytes", 0.05, True),
        ("loss   1.00, 1,000 bytes", 0.0, True),
        ("loss 1.04, 1,000 bytes", 0.0, False),
        ("loss 1.00, 1,200 bytes", 0.05, False),
        ("loss 1.00, 1,000 byte", 0.05, False),
        ("loss 1.00", 0.05, False),
    ],
)
def test_what_a_block_prints_is_compared_with_what_the_page_shows(shown, tolerance, same):
    assert is_shown("loss 1.00, 1,000 bytes\n", shown, tolerance) is same


def test_a_page_that_shows_what_its_block_does_not_print_fails(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nprint(1)\n```\n\n<!-- output, numbers to 0.05 -->\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:7: the block above prints\s+1"):
        run_blocks(blocks_of(path))


def test_the_reader_of_documents_refuses_an_open_block(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("text\n```python\nx = 1\n")
    with pytest.raises(ValueError, match=r"page\.md:2: this code block is never closed"):
        blocks_of(path)
