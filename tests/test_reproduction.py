"""The studies, end to end on a tiny random model and a few made-up rows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.accuracy import training
from benchmarks.accuracy.tasks import TASKS
from peft_mask.analysis import block, dissimilarity, effective_weights, masks_of
from reproduction import __main__ as command
from reproduction import layers, sparsity
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.sweep import sweep
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
    small += ["--tasks", "trec"]
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
    assert [row["variant"] for row in found["sparsity"]["rows"]] == ["1%", "3%", "5%", "10%", "20%", "50%", "95%"]
    five = next(row for row in found["sparsity"]["rows"] if row["variant"] == "5%")
    assert found["layers"]["rows"] == [five | {"variant": "all 1"}]
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


def test_a_sweep_chooses_the_rate_of_each_variant_on_dev_and_goes_on_where_it_was(data, model, tmp_path, monkeypatch):  # noqa: F811
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    variants = {name: sparsity.at_start(p) for name, p in (("few", 0.05), ("many", 0.5))}
    one = sweep(models, variants, Scale(tasks=("trec",), seeds=(0,), rates=(1e-3, 1.0)))
    trained: list[tuple[str, int]] = []

    def train(task, method, lr, seed, *more):
        trained.append((method.name, seed))
        return real(task, method, lr, seed, *more)

    real = training.train
    monkeypatch.setattr(training, "train", train)
    two = sweep(models, variants, Scale(tasks=("trec",), seeds=(0, 1), rates=(1e-3, 1.0)))
    assert trained == [("paper-0.05", 1), ("paper-0.5", 1)], "the chosen rate of each, and nothing twice"
    for first, both in zip(one, two, strict=True):
        dev = dict(part.split(": ") for part in first["dev at each rate"].split(", "))
        assert dev.keys() == {"0.001", "1"}
        assert first["lr"] == max(dev, key=lambda lr: float(dev[lr]))  # the first, that is the smaller, of equal ones
        assert (first["seeds"], both["seeds"], both["lr"]) == (1, 2, first["lr"])
        assert first["deviation"] is None
        assert both["deviation"] is not None
        assert float(first["flipped"].rstrip("%")) > 0


def test_the_sweeps_vary_what_they_say(data, tmp_path, monkeypatch):
    def variants_of(study):
        monkeypatch.setattr(study, "sweep", lambda models, variants, scale: variants)
        return study.run(models, Scale(sparsities=(0.01, 0.5, 0.95)))["rows"]

    deep = tmp_path / "deep"
    BertModel(BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=6, num_attention_heads=2)).save_pretrained(
        deep
    )
    models = Models(command.Setting(data, str(deep)), tmp_path)

    def start(method):
        return masks_of(training.untrained(TASKS["trec"], method, 0, models.setting))

    for name, method in variants_of(sparsity).items():
        assert start(method).sparsity == pytest.approx(float(name.rstrip("%")) / 100, abs=0.004)
    blocks = {name: {int(block(part)) for part in start(method)} for name, method in variants_of(layers).items()}
    assert blocks == {
        "bottom-up 1": {0},
        "top-down 1": {5},
        "bottom-up 2": {0, 1},
        "top-down 2": {4, 5},
        "bottom-up 4": {0, 1, 2, 3},
        "top-down 4": {2, 3, 4, 5},
        "all 6": {0, 1, 2, 3, 4, 5},
    }


def test_pictures_of_sweeps_have_a_line_a_task_and_direction(tmp_path):
    rows = [{"task": "trec", "variant": name, "test": 0.5} for name in ("bottom-up 1", "top-down 1", "all 2")]
    layers.draw({"rows": rows}, tmp_path / "layers.svg")
    sparsity.draw({"rows": [{"task": "trec", "variant": "5%", "test": 0.5}]}, tmp_path / "sparsity.svg")
    assert all(f"<!-- trec, {name} -->" in (tmp_path / "layers.svg").read_text("utf-8") for name in layers.DIRECTIONS)
    assert "<!-- 5% -->" in (tmp_path / "sparsity.svg").read_text("utf-8")


def test_studies_that_are_none_and_missing_data_are_refused(tmp_path, capsys):
    for arguments, message in ((["lines"], "there is no study"), (["line"], "--data is missing")):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--results", str(tmp_path)])
        assert message in capsys.readouterr().err
