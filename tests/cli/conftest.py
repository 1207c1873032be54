"""Bases, adapters and what a command says of them; nothing here is changed by a test."""

import json
from dataclasses import dataclass

import pytest
import yaml

from peft_mask.cli.main import main
from tests.server.places import KINDS, Place

ROWS = [f"{word} {i},{label}" for i in range(12) for word, label in (("cat", "pet"), ("oak", "tree"))]
QUICK = {"max_steps": 2, "use_cpu": True}


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def data(self):
        return json.loads(self.out)


@pytest.fixture
def run(capfd):
    """Run a command in this process, and return its exit code and what it printed."""

    def running(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return Said(code, *capfd.readouterr())

    return running


@pytest.fixture
def refused(run):
    """Run a command that ends with 2, and return the one line that says why."""

    def running(*arguments):
        said = run(*arguments)
        assert (said.code, said.out) == (2, ""), said
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("peft-mask")
        return said.err.rstrip("\n")

    return running


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A classifier's base, and the adapters a, b and c of two, five and three labels."""
    made = Place(tmp_path_factory.mktemp("cli-classify"), KINDS["classify"])
    made.save("thin", 3, target_sparsity=0.02, candidates=0.1)
    made.save("thin-too", 4, target_sparsity=0.02, candidates=0.1)
    made.save("bound", 3, target_sparsity=0.02, candidates=0.1, portable=False)
    return made


@pytest.fixture(scope="session")
def talking(tmp_path_factory):
    """A language model, and adapters of it without heads."""
    return Place(tmp_path_factory.mktemp("cli-generate"), KINDS["generate"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a table of pets and trees, which commands are typed in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *ROWS]))
    return tmp_path


@pytest.fixture
def task(here, tiny_bert):
    """Write task.yaml, of texts and a tiny BERT where nothing else is said, and return its name."""

    def writing(**own):
        said = {"task": "text-classification", "model_name_or_path": tiny_bert, "train_file": "rows.csv"}
        said |= {"test_file": "rows.csv", "output_dir": "out"} | QUICK | own
        (here / "task.yaml").write_text(yaml.safe_dump({name: v for name, v in said.items() if v is not None}))
        return "task.yaml"

    return writing
