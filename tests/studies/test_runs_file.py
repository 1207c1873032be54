"""Trainings as rows of one file: none is lost, whoever is killed and however many write."""

import json
import multiprocessing
import os
import signal
import time
import warnings
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.runs_file import RunsFile

KEY = ("task", "lr")
ROW = {"task": "trec", "lr": 1e-3, "dev": 0.5}


@pytest.fixture
def runs(tmp_path: Path) -> RunsFile:
    return RunsFile(tmp_path / "results", KEY)


FIGURES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(figures=FIGURES, lr=st.floats(allow_nan=False))
def test_a_row_comes_back_as_it_was_added(tmp_path_factory: pytest.TempPathFactory, figures: object, lr: float) -> None:
    runs = RunsFile(tmp_path_factory.mktemp("runs"), KEY)
    row = {"task": "trec \u2028 \n", "lr": lr, "figures": figures}
    runs.add(row)
    for _ in range(2):
        ((key, found),) = runs.read().items()
        assert key == (row["task"], lr)
        assert found == row
        assert json.dumps(found) == json.dumps(row), "types and signs of zeros, too"
        runs.tidy()


def test_there_are_no_rows_without_a_file_and_reading_makes_none(runs: RunsFile) -> None:
    assert runs.read() == {}
    runs.tidy()
    assert not runs.folder.exists()


def test_the_last_row_of_a_training_counts_and_tidy_leaves_it_alone_and_sorted(runs: RunsFile) -> None:
    for row in (ROW | {"lr": 1e-2}, ROW, {"task": "sst2", "lr": 1.0}, ROW | {"lr": 3e-5}, ROW | {"test": 0.75}):
        runs.add(row)
    expected = [{"task": "sst2", "lr": 1.0}, ROW | {"lr": 3e-5}, ROW | {"test": 0.75}, ROW | {"lr": 1e-2}]
    assert list(runs.read().values()) == expected
    assert len(runs.path.read_bytes().splitlines()) == 5, "rows are appended"
    runs.tidy()
    assert list(map(json.loads, runs.path.read_bytes().splitlines())) == expected
    before = runs.path.stat()
    runs.tidy()
    assert os.path.samestat(before, runs.path.stat()), "a tidy file is not written again"
    assert [path.name for path in runs.folder.iterdir()] == ["runs.jsonl"]


def test_a_row_without_its_newline_is_cut_off_unless_it_is_whole(runs: RunsFile) -> None:
    runs.add(ROW)
    runs.add(ROW | {"lr": 1.0, "told": "naïve"})
    content = runs.path.read_bytes()
    first = content.index(b"\n") + 1
    for end in range(first, len(content) + 1):
        torn = content[:end]
        cut = first < end < len(content) - 1
        known = [(ROW["task"], ROW["lr"])] if end < len(content) - 1 else list(runs_of(content))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            runs.path.write_bytes(torn)
            assert list(runs.read()) == known
            runs.add(ROW | {"lr": 2.0})
        assert len(told) == 2 * cut, "by the reader and by the writer"
        assert list(runs.read()) == [*known, ("trec", 2.0)], "and nothing is left of it"


def runs_of(content: bytes) -> dict[tuple[str, float], dict[str, object]]:
    rows = map(json.loads, content.splitlines())
    return {(row["task"], row["lr"]): row for row in rows}


def test_what_was_cut_off_is_told(runs: RunsFile) -> None:
    runs.add(ROW)
    with runs.path.open("ab") as file:
        file.write(b'{"task": "tr')
    told = r"runs.jsonl', line 2, was cut off after 12 bytes; that training counts as not done"
    with pytest.warns(UserWarning, match=told):
        assert list(runs.read().values()) == [ROW]
    with pytest.warns(UserWarning, match=told):
        runs.tidy()
    assert runs.path.read_bytes().count(b"\n") == 1
    assert list(runs.read().values()) == [ROW]


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "", "5", "null", "[1]", '"task lr"', '{"task": "trec"}', "\0"])
def test_a_line_that_is_no_row_is_refused_by_its_number(runs: RunsFile, line: str) -> None:
    runs.add(ROW)
    before = runs.path.read_bytes()
    broken = before + line.encode() + b"\n" + before
    runs.path.write_bytes(broken)
    for read in (runs.read, runs.tidy):
        with pytest.raises(ValueError, match=r"runs.jsonl', line 2: expected a JSON object with task, lr, got .* Mend"):
            read()
    assert runs.path.read_bytes() == broken


def test_a_row_without_its_key_is_not_added(runs: RunsFile) -> None:
    with pytest.raises(ValueError, match="a training is known by task, lr, this row has no lr"):
        runs.add({"task": "trec"})
    assert runs.read() == {}


def _add_many(folder: Path, task: str, count: int, tidy: bool) -> None:
    runs = RunsFile(folder, KEY)
    for i in range(count):
        runs.add({"task": task, "lr": float(i), "told": "x" * 5000})
        if tidy:
            runs.tidy()


# Python 3.12 and later say it of a fork where there are threads
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def _writer(*arguments: object) -> ForkProcess:
    return multiprocessing.get_context("fork").Process(target=_add_many, args=arguments)


@forks
def test_processes_that_write_and_sort_at_once_lose_no_row(runs: RunsFile) -> None:
    processes = [_writer(runs.folder, task, 40, tidy) for task, tidy in (("a", False), ("b", True), ("c", True))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert list(runs.read()) == [(task, float(i)) for task in "abc" for i in range(40)]


@forks
def test_a_writer_that_is_killed_leaves_what_it_had_added(runs: RunsFile) -> None:
    writer = _writer(runs.folder, "a", 10**6, True)
    writer.start()
    while not runs.path.exists() or runs.path.stat().st_size < 50_000:
        assert writer.is_alive()
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    before = list(runs.read())  # a line may be cut off, which would be told
    runs.add(ROW)
    assert before == [("a", float(i)) for i in range(len(before))]
    assert len(before) >= 9
    assert list(runs.read()) == [*before, ("trec", 1e-3)], "and the lock is free"
