import json
import subprocess
import sys
from pathlib import Path

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
    "pandas",
    "examples",
    "benchmarks",
    "attacks",
}
HEAVY_PARTS = {"torch._inductor", "peft_mask.kernels", "peft_mask.analysis", "peft_mask.cli"}


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
