"""docs/command-line.md: what it says that commands print is what they print."""

import re
import shlex

import pytest

from tests.project.test_documents import ROOT, blocks_of
from tests.versions import RUNS_ON_META

PAGE = ROOT / "docs" / "command-line.md"


def test_the_page_shows_what_the_commands_print(run, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert", reason="vl-convert, which draws the charts of a report, is not installed")
    if not RUNS_ON_META:
        pytest.skip("this transformers' models do not run without weights")
    monkeypatch.chdir(tmp_path)
    printed, compared = "", 0
    for block in blocks_of(PAGE):
        if block.language == "python" and not block.not_run:
            exec(block.compiled(), {"__name__": "__main__"})
        elif block.language == "bash":
            commands = [shlex.split(line)[1:] for line in block.source.splitlines() if line.startswith("peft-mask ")]
            said = [run(*command) for command in commands if command[0] not in ("env", "serve", "train")]
            assert all(each.code in (0, 1) for each in said), said
            printed = "".join(each.out for each in said)
        elif block.language == "text":
            assert _without_sizes(block.source) == _without_sizes(printed), block.where
            compared += 1
    assert compared == 9


def _without_sizes(text):
    """The text without the size of the page and of files, which releases of the libraries change by a few bytes."""
    return re.sub(r"(of|html:) [\d.]+ kB", r"\1 some kB", text)
