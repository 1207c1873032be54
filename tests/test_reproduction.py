"""The studies, end to end on a tiny random model and a few made-up rows."""

import json
from pathlib import Path

import pytest
import torch

from peft_mask.analysis import dissimilarity, effective_weights, masks_of
from reproduction import __main__ as command
from reproduction.models import Models
from tests.test_accuracy_benchmark import model, write_split  # noqa: F401 (a fixture)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, labels in (("trec", 3), ("sst2", 2)):
        (folder / name).mkdir(parents=True)
        (folder / name / "labels.json").write_text(json.dumps([str(i) for i in range(labels)]), "utf-8")
        for split, count in (("train", 40), ("dev", 30), ("test", 20)):
            write_split(folder, "trec", split, count)
            written = (folder / "trec" / f"{split}.jsonl").read_text("utf-8")
            (folder / name / f"{split}.jsonl").write_text(
                written.replace('"label": 2', f'"label": {labels - 1}'), "utf-8"
            )
    return folder


def study(data: Path, model: Path, results: Path, *more: str) -> None:  # noqa: F811
    options = ["--data", data, "--model", model, "--results", results, "--steps", 2, "--rows", 30, "--threads", 1]
    small = ["--recipes", "mask", "paper", "--points", 3, "--curve-steps", 2, "--seeds", 0, 1, "--every", 1]
    command.main([str(option) for option in [*more, *options, *small]])


@pytest.mark.slow
def test_one_command_does_every_study_and_does_none_twice(data, model, tmp_path, capsys):  # noqa: F811
    results = tmp_path / "results"
    study(data, model, results)
    names = set(command.STUDIES)
    assert {path.stem for path in results.glob("*.json")} == {path.stem for path in results.glob("*.png")} == names
    page = (results / "README.md").read_text("utf-8")
    assert all(f"({name}.png)" in page for name in names)
    written = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    capsys.readouterr()
    study(data, model, results)
    assert capsys.readouterr().out == ""
    assert written == {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}

    found = {name: json.loads((results / f"{name}.json").read_text("utf-8")) for name in names}
    assert [row["tasks"] for row in found["storage"]["rows"]] == list(range(1, 12))
    assert len(found["line"]["rows"]) == 5 * 3
    assert len(found["representations"]["points"]["masked"]) == 30
    assert [row["step"] for row in found["movement"]["rows"]] == [0, 1, 2]
    assert {row["mask"] for row in found["controls"]["rows"]} >= {"learned", "shuffled, seed 0", "largest weights"}
    assert all(result["environment"]["torch"] == torch.__version__ for result in found.values())


def test_trainings_of_one_seed_start_alike_in_every_task(data, model, tmp_path):  # noqa: F811
    models = Models(command.Setting(data, str(model)), tmp_path, steps=1)
    starts = {
        (task, seed): masks_of(models.untrained(task, "paper", seed)) for task in ("trec", "sst2") for seed in (0, 1)
    }
    assert starts["trec", 0] == starts["sst2", 0] != starts["trec", 1]
    first, second = (effective_weights(models.untrained("sst2", way, 0)) for way in ("full", "mask"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "the same head"


def test_a_model_whose_parameters_are_gone_is_trained_again_to_the_same(data, model, tmp_path):  # noqa: F811
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    before = masks_of(models.trained("trec", "mask", 0))
    assert before.sparsity > 0
    models.run("trec", "mask", 0).state.unlink()
    after = masks_of(models.trained("trec", "mask", 0))
    assert dissimilarity(before, after) == dict.fromkeys(before, 0.0)


def test_studies_that_are_none_and_missing_data_are_refused(tmp_path, capsys):
    for arguments, message in ((["lines"], "there is no study"), (["line"], "--data is missing")):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--results", str(tmp_path)])
        assert message in capsys.readouterr().err
