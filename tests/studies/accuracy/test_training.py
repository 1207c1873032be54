"""One training: a function of its seed, watched, restored, followed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import long
from benchmarks.accuracy import training
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Method, Setting
from tests.studies.made_up import STEPS


def test_test_is_scored_with_the_parameters_of_the_run(setting: Setting, tmp_path: Path) -> None:
    method, task, state = METHODS["mask"], TASKS["ud_ewt_pos"], tmp_path / "state.safetensors"
    assert isinstance(method, Method)
    (setting.data / task.name / "test.conll").write_bytes((setting.data / task.name / "dev.conll").read_bytes())
    figures = training.train(task, method, 1e-3, 1, STEPS, setting, state)
    assert training.score_test(task, method, 1, setting, state) == figures["dev"]


def test_a_run_is_a_function_of_its_seed(setting: Setting) -> None:
    method = METHODS["lora-r8"]
    assert isinstance(method, Method)
    losses = [training.train(TASKS["trec"], method, 1e-3, seed, STEPS, setting)["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_can_be_watched(setting: Setting) -> None:
    method, seen = METHODS["full"], []
    assert isinstance(method, Method)

    def watch(step: int, model: torch.nn.Module) -> None:
        seen.append((step, model.classifier.weight.detach().clone()))

    training.train(TASKS["trec"], method, 1e-3, 0, STEPS, setting, watch=watch)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    first = training.untrained(TASKS["trec"], method, 0, setting).classifier.weight
    assert torch.equal(seen[0][1], first), "before the first step"
    assert all(not torch.equal(a, b) for (_, a), (_, b) in pairwise(seen)), "after each"


def test_parameters_of_another_method_are_refused(setting: Setting, tmp_path: Path) -> None:
    method = METHODS["full"]
    assert isinstance(method, Method)
    save_file({"other": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"cannot score 'state.safetensors': it holds other parameters than full"):
        training.score_test(TASKS["trec"], method, 0, setting, tmp_path / "state.safetensors")


def test_a_long_training_is_followed_along_the_way(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long, "MARKS", (1, 3, 5))
    options = ["--data", setting.data, "--model", setting.model, "--results", tmp_path / "long", "--steps", STEPS]
    long.main([str(option) for option in [*options, "--batch_size", 8]])
    ((key, result),) = long.runs_in(tmp_path / "long").read().items()
    assert key == ("trec", "mask", 5e-4, 8, STEPS)
    small = training.train(TASKS["trec"], METHODS["mask"], 5e-4, 0, STEPS, replace(setting, batch_size=8))
    assert result["loss"] == small["loss"]
    assert result["batch_size"] == 8
    assert list(result["along"]) == ["1", "3"]
    assert result["along"]["3"] == result["dev"], "scoring on the way changes nothing"
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"| {100 * result['dev']:.1f} |" in line
    assert line in (tmp_path / "long/README.md").read_text("utf-8")


def test_scoring_on_the_way_does_not_end_the_training_mode(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "MARKS", (1,))
    arguments, dropped = (TASKS["trec"], METHODS["mask"], 5e-4), replace(setting, dropout=0.5)
    followed = long.follow(*arguments, STEPS, dropped)
    assert followed["loss"] == training.train(*arguments, 0, STEPS, dropped)["loss"]
