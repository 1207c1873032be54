import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parents[2]

# What the package must never load by itself: a user who trains or serves a mask does not need it.
HEAVY = {
    "matplotlib",
    "sklearn",
    "datasets",
    "evaluate",
    "bitsandbytes",
    "triton",
    "vl_convert",
    "markdown_it",
    "pandas",
    "examples",
    "benchmarks",
    "attacks",
}
HEAVY_PARTS = {
    "torch._inductor",
    "peft_mask.analysis",
    "peft_mask.cli",
    "peft_mask.integrations",
    "peft_mask.recipes",
    "peft_mask.vllm",
}


def test_imports_point_in_one_direction(capsys):
    status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_import_is_light_and_silent():
    # Measured on top of the dependencies: what those load themselves is not ours to mend.
    code = """
import json, sys
import torch, transformers, peft
before = set(sys.modules)
print("ours from here on", file=sys.stderr, flush=True)
import peft_mask
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.partition("ours from here on\n")[1:] == ("ours from here on\n", "")
    loaded = json.loads(run.stdout)  # so nothing else was printed
    assert "peft_mask" in loaded
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []
    assert [name for name in loaded if any(name == part or name.startswith(f"{part}.") for part in HEAVY_PARTS)] == []


def picture(name="architecture"):
    """The module that draws the picture of the rooms, or another one."""
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "images" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_the_imports_as_they_are():
    drawn = (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8")
    assert picture().drawn() == drawn, "draw it again: python docs/images/architecture.py"


@pytest.mark.parametrize("name", ["idea", "proof"])
def test_pictures_are_what_their_scripts_draw(name):
    drawn = (ROOT / "docs" / "images" / f"{name}.svg").read_text("utf-8")
    assert picture(name).drawn() == drawn, f"draw it again: python docs/images/{name}.py"


def test_no_import_runs_upward():
    order = picture().rooms()
    assert [pair for pair in picture().imports() if order.index(pair[0]) > order.index(pair[1])] == []


def test_the_architecture_page_names_every_file_in_the_paragraph_of_its_room():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for room in picture().rooms():
        paragraph = re.search(rf"^\*\*`{room}/`: .*?(?=\n\n)", page, re.M | re.S)[0]
        files = {path.stem for path in (ROOT / "peft_mask" / room).glob("*.py")} - {"__init__", "__main__"}
        if room != "analysis":  # whose files have a page of their own
            assert files - set(re.findall(r"`(\w+)`", paragraph)) == set()


def test_only_the_front_door_stands_at_the_first_level():
    assert {path.name for path in (ROOT / "peft_mask").glob("*.*")} == {"__init__.py", "__main__.py", "py.typed"}


def test_documents_examples_and_messages_name_the_front_door_alone():
    open_rooms = ("analysis", "integrations", "recipes", "server", "vllm")
    rooms = "|".join(room for room in picture().rooms() if room not in open_rooms)
    inside = re.compile(rf"\bpeft_mask\.(?:{rooms})\b")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.*")]
    texts = [path.read_text("utf-8") for path in pages if path.suffix in (".py", ".md")]
    for path in (ROOT / "peft_mask").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    assert [text for text in texts if inside.search(text)] == []
