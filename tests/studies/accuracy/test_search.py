"""Which trainings there are: rates, seeds, what is taken up again, and when test is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import runs, summary, tasks, training
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.tasks import TASKS, Rows
from benchmarks.accuracy.training import Setting
from tests.studies.made_up import STEPS, results_in


def test_a_run_cut_off_is_taken_up_where_it_stopped(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = training.train, []

    def cut_off(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(training, "train", cut_off)
    for _ in range(2):
        try:
            runs.search(TASKS["trec"], METHODS["lora-r1"], [0], setting, tmp_path, STEPS)
        except KeyboardInterrupt:
            assert len(results_in(tmp_path)) == 2
    assert len(calls) == 4, "three tries, one of them begun twice"
    assert len(results_in(tmp_path)) == 3


def test_a_run_whose_parameters_are_gone_before_its_test_is_trained_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> float:
        raise KeyboardInterrupt

    search = (TASKS["trec"], METHODS["mask"], [0], setting, tmp_path, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(training, "score_test", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.search(*search)
    (before,) = results_in(tmp_path).values()
    (state,) = tmp_path.rglob("*.safetensors")
    state.unlink()
    train, calls = training.train, []

    def told(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return train(*arguments) | {"trained_parameters": -1}

    monkeypatch.setattr(training, "train", told)
    runs.search(*search)
    assert len(calls) == 1
    (after,) = results_in(tmp_path).values()
    assert after.keys() - before.keys() == {"test"}
    assert after["loss"] == before["loss"]
    assert after["trained_parameters"] == -1 < before["trained_parameters"], "the row of the second training"


@pytest.mark.parametrize("name", ["mask", "lora-r1", "probe"])
def test_search_never_reads_test(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read: list[str] = []
    load = tasks.load_rows

    def spy(task: tasks.Task, split: tasks.Split, model: str, data: Path) -> Rows:
        if split == "test":
            read.append(f"test after {len(results_in(tmp_path))} results")
        return load(task, split, model, data)

    monkeypatch.setattr(training, "load_rows", spy)
    runs.search(TASKS["trec"], METHODS[name], [0, 1], setting, tmp_path, STEPS)
    tries = len(METHODS[name].lrs)
    expected = {f"test after {tries} results"}
    if name != "probe":
        expected.add(f"test after {tries + 1} results")
    assert set(read) == expected
    scored = [result for result in results_in(tmp_path).values() if "test" in result]
    assert len({result["lr"] for result in scored}) == 1
    assert len(scored) == (1 if name == "probe" else 2)


def test_search_chooses_the_rate_best_on_dev_and_the_smaller_of_equals(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.7}
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a: {**train(*a), "dev": dev[a[2]]})
    runs.search(TASKS["trec"], METHODS["lora-r8"], [0], setting, tmp_path, STEPS)
    scored = [key for key, result in results_in(tmp_path).items() if "test" in result]
    assert scored == [("trec", "lora-r8", 3e-3, 0, STEPS)]


def test_dev_chooses_among_more_rates_while_the_best_is_at_the_edge(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST", 7)
    dev = {3e-3: 0.6, 1e-2: 0.7, 3e-2: 0.8, 1e-1: 0.75}
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a: {**train(*a), "dev": dev[a[2]]})
    open_ended = replace(METHODS["lora-r1"], lrs=(3e-3, 1e-2))
    runs.search(TASKS["trec"], open_ended, [0], setting, tmp_path, STEPS)
    assert sorted(result["lr"] for result in results_in(tmp_path).values()) == sorted(dev)
    assert [key[2] for key, result in results_in(tmp_path).items() if "test" in result] == [3e-2]
    assert runs.unfinished_steps(TASKS["trec"], open_ended, [0], tmp_path, STEPS) == 0


@pytest.mark.parametrize(
    ("lrs", "best", "further"),
    [
        ((1e-3, 3e-3, 1e-2), 1e-2, 3e-2),
        ((1e-3, 3e-3, 1e-2), 1e-3, 3e-4),
        ((5e-4, 7e-3), 7e-3, 1e-2),
        ((1e-3, 3e-3, 1e-2), 3e-3, None),
        ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-1, None),
        ((5e-4,), 5e-4, None),
    ],
)
def test_the_next_rate_is_about_three_times_beyond_an_edge(
    lrs: tuple[float, ...], best: float, further: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST", 7)
    assert runs.beyond(lrs, best) == further


def test_a_result_made_with_other_settings_is_refused(setting: Setting, tmp_path: Path) -> None:
    runs.search(TASKS["trec"], METHODS["probe"], [0], setting, tmp_path, STEPS)
    row = "the row task=trec, method=probe, lr=0.001, seed=0, steps=3 of '.*runs.jsonl'"
    with pytest.raises(ValueError, match=row + r" was made with the settings .* Delete that row"):
        runs.search(TASKS["trec"], METHODS["probe"], [0], replace(setting, batch_size=8), tmp_path, STEPS)


def test_the_rate_that_dev_likes_best_is_in_the_tables(setting: Setting, tmp_path: Path) -> None:
    runs.search(TASKS["trec"], METHODS["probe"], [0], setting, tmp_path, STEPS)
    results = [{**result, "dev": 0.5, "test": 0.7} for result in summary.read_results(tmp_path)]
    (row,) = summary.rows_of(results)
    assert (row.lr, row.at_edge) == (0.001, True), "the smallest of equal ones"
    results[1] |= {"dev": 0.6, "test": 0.4}
    (row,) = summary.rows_of(results)
    assert (row.lr, row.test, row.at_edge) == (0.01, (0.4,), False), "though its test is worse"
    del results[1]["test"]
    assert not summary.rows_of(results), "the test of another rate does not stand in for it"
