"""A program that only reads masks needs torch, numpy and safetensors: here a process in which nothing else is found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_mask import Masks

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "adapter"
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run(
    code: str, missing: tuple[str, ...] = ("peft", "transformers", "accelerate")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT.format(missing=missing) + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_masks_are_read_and_written(tmp_path):
    code = f"""
from peft_mask import Masks
masks = Masks.load({str(GOLDEN)!r})
(masks & masks).save({str(tmp_path)!r})
assert not {{"peft", "transformers", "accelerate"}} & set(sys.modules)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert Masks.load(tmp_path) == Masks.load(GOLDEN)


def test_masks_are_made_of_tensors(tmp_path):
    code = f"""
import torch
from peft_mask import Masks
Masks({{"layer": torch.arange(12).view(3, 4) % 5 > 0}}).save({str(tmp_path)!r})
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert torch.equal(Masks.load(tmp_path)["layer"], torch.arange(12).view(3, 4) % 5 > 0)


@pytest.mark.parametrize("missing", [("peft",), ("transformers",)])
def test_everything_else_says_what_is_missing(missing):
    done = run("from peft_mask import MaskConfig", missing)
    assert "ImportError: peft_mask.MaskConfig needs PEFT and transformers" in done.stderr
    assert f"No module named '{missing[0]}" in done.stderr


def test_a_name_that_does_not_exist_is_no_matter_of_what_is_installed():
    done = run("import peft_mask; peft_mask.LoraConfig")
    assert "AttributeError: module 'peft_mask' has no attribute 'LoraConfig'" in done.stderr
