"""Bases, adapters and what a command says of them; nothing here is changed by a test."""

import json
from dataclasses import dataclass

import pytest

from peft_mask.cli.main import main
from tests.server.places import KINDS, Place


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
