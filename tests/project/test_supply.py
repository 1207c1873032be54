"""What is shipped: the wheel holds the package and nothing else, in the same bytes whoever builds it."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import peft_mask

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"

# loudly: pytest's summary prints the reasons of what was skipped
builds = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed"
)


def wheel(folder, epoch="1600000000"):
    """Build the wheel from a copy of the sources, with times of its own."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(ROOT / "peft_mask", source / "peft_mask", copy_function=shutil.copyfile)
    for directory in ("tests", "attacks", "build"):  # what must not go in
        (source / directory).mkdir()
        (source / directory / "__init__.py").touch()
    run = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": epoch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder / run.stdout.split()[-1]


@builds
def test_the_wheel_holds_the_package_and_its_metadata(tmp_path):
    kinds = ("*.py", "*.html", "*.typed")
    ours = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "peft_mask").rglob(kind)}
    info = f"peft_mask-{peft_mask.__version__}.dist-info"
    metadata = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    file = wheel(tmp_path)
    assert file.name == f"peft_mask-{peft_mask.__version__}-py3-none-any.whl"
    assert set(zipfile.ZipFile(file).namelist()) == ours | metadata
    assert "peft_mask/py.typed" in ours


@builds
def test_two_builds_are_the_same_bytes(tmp_path):
    first, second = wheel(tmp_path / "one"), wheel(tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()
    assert wheel(tmp_path / "later", epoch="1700000000").read_bytes() != first.read_bytes()  # what the variable decides


def test_the_package_unpickles_and_executes_nothing():
    forbidden = {
        "pickle",
        "marshal",
        "shelve",
        "subprocess",
        "ctypes",
        "importlib",
        "eval",
        "exec",
        "compile",
        "open_code",
    }
    for path in (ROOT / "peft_mask").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if getattr(node, "module", None) == "importlib.metadata":  # which tells versions and imports nothing
                    continue
                used = {name.partition(".")[0] for name in names}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                used = {node.func.id}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                used = (
                    {"pickle"}
                    if (node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id == "torch")
                    else set()
                )
            else:
                continue
            assert not used & forbidden, f"{path.name}:{node.lineno}"


def test_the_version_is_the_same_wherever_it_stands():
    said = {
        "pyproject.toml": re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[
            1
        ],
        "CITATION.cff": re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)[1],
    }
    assert said == dict.fromkeys(said, peft_mask.__version__)


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name)
def test_workflows_call_what_is_there_and_may_write_only_where_they_say_so(file):
    workflow = yaml.safe_load(file.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    commands = "\n".join(step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", commands)) <= set(targets)
    for module in re.findall(r"-m (tests\.\w+)", commands):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    for script in re.findall(r"^(\.[/\w]+)$", commands, flags=re.MULTILINE):
        assert (ROOT / script).exists()
