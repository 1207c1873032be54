"""The two tasks and the encoder that the tests of the benchmark train with."""

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import runs
from benchmarks.accuracy.training import Setting
from tests.studies.made_up import write_split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two of the table's tasks with 40 training rows each."""
    folder = tmp_path / "data"
    for name in ("trec", "ud_ewt_pos"):
        (folder / name).mkdir(parents=True)
        (folder / name / "labels.json").write_text(json.dumps(["NOUN", "VERB", "X"]), "utf-8")
        for split, count in (("train", 40), ("dev", 9), ("test", 7)):
            write_split(folder, name, split, count)
    return folder


@pytest.fixture
def setting(data: Path, model: Path) -> Setting:
    return Setting(data, str(model))


@pytest.fixture(autouse=True)
def no_more_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own rates are enough here, though what is best of tiny models is often at the edge."""
    monkeypatch.setattr(runs, "MOST", 0)
