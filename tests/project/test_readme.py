"""The README's quickstart on other architectures than its own."""

import re
from pathlib import Path

import pytest

from tests.project.test_documents import blocks_of
from tests.tiny_models import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama", "t5"])
def test_the_quickstart_runs_on_other_architectures(family, tmp_path, monkeypatch):
    source = next(block.source for block in blocks_of(ROOT / "README.md") if block.language == "python")
    # everything but how its tiny model and its inputs are made
    source, models = re.subn(r"config = .*\nbase = .*\n", "", source)
    source, inputs = re.subn(r"inputs = .*\n", "", source)
    assert (models, inputs) == (1, 1)
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    base = tiny_model(family)
    namespace = {"base": base, "inputs": tiny_inputs(base, labels=True)}
    monkeypatch.chdir(tmp_path)
    exec(source, namespace)
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size > 0
    assert type(namespace["plain"]) is type(base)
