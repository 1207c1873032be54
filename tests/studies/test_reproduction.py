"""The studies, end to end on a tiny random model and a few made-up rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.accuracy import training
from benchmarks.accuracy.runs import runs_in
from benchmarks.accuracy.tasks import TASKS
from peft_mask.analysis import block, dissimilarity, effective_weights, masks_of
from reproduction import __main__ as command
from reproduction import (
    controls,
    curve,
    ensembles,
    layers,
    line,
    movement,
    reinitialized,
    representations,
    sentiment,
    sparsity,
)
from reproduction import dissimilarity as dissimilarity_study
from reproduction.models import Models
from reproduction.scale import Scale
from reproduction.seeds import bars, over_seeds
from reproduction.sweep import sweep
from tests.studies.made_up import write_split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, labels in (("trec", 3), ("sst2", 2), ("custrev", 2), ("tweets", 2)):
        (folder / name).mkdir(parents=True)
        (folder / name / "labels.json").write_text(json.dumps([str(i) for i in range(labels)]), "utf-8")
        for split, count in (("train", 40), ("dev", 30), ("test", 20)):
            write_split(folder, "trec", split, count)
            written = (folder / "trec" / f"{split}.jsonl").read_text("utf-8")
            (folder / name / f"{split}.jsonl").write_text(
                written.replace('"label": 2', f'"label": {labels - 1}'), "utf-8"
            )
    return folder


def study(data: Path, model: Path, results: Path, *more: str) -> None:
    options = ["--data", data, "--model", model, "--results", results, "--steps", 2, "--rows", 30, "--threads", 1]
    small = ["--recipes", "mask", "paper", "--points", 3, "--curve-steps", 2, "--seeds", 0, 1, "--every", 1]
    small += ["--tasks", "trec", "--cycles", 3]
    command.main([str(option) for option in [*more, *options, *small]])


@pytest.mark.slow
def test_one_command_does_every_study_and_does_none_twice(data, model, tmp_path, capsys):
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

    trainings = runs_in(results / "trainings")
    assert list(map(json.loads, trainings.path.read_bytes().splitlines())) == list(trainings.read().values())

    found = {name: json.loads((results / f"{name}.json").read_text("utf-8")) for name in names}
    assert [row["tasks"] for row in found["storage"]["rows"]] == list(range(1, 12))
    assert len(found["line"]["rows"]) == 5 * 3
    assert all(len(of_seeds) == 2 for of_seeds in found["line"]["barriers"].values())
    members = {row["models"]: row["members"] for row in found["ensembles"]["rows"]}
    assert set(members.values()) == {2, 3}, "of seeds, and of snapshots"
    assert len(found["generalization"]["rows"]) == 3 * 2 * 3
    assert [row["flipped"] is None for row in found["reinitialized"]["rows"]] == [True] * 5 + [False] * 5
    assert len(found["representations"]["points"]["masked"]) == 30
    assert [row["step"] for row in found["movement"]["rows"]] == [0, 1, 2]
    assert {row["mask"] for row in found["controls"]["rows"]} >= {"learned", "shuffled", "largest weights"}
    assert len(found["curve"]["barriers"]) == 2
    pairs = {(row["recipe"], row["pair"]): row["pairs"] for row in found["dissimilarity"]["rows"]}
    assert pairs == {
        ("mask", "TREC and SST-2, one seed"): 2,
        ("mask", "TREC, two seeds"): 1,
        ("mask", "SST-2, two seeds"): 1,
        ("paper", "TREC and SST-2, one seed"): 2,
    }
    assert [row["variant"] for row in found["sparsity"]["rows"]] == ["1%", "3%", "5%", "10%", "50%", "95%"]
    five = next(row for row in found["sparsity"]["rows"] if row["variant"] == "5%")
    assert found["layers"]["rows"] == [five | {"variant": "all 1"}]
    assert all(result["environment"]["torch"] == torch.__version__ for result in found.values())


def test_trainings_of_one_seed_start_alike_in_every_task(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=1)
    starts = {
        (task, seed): masks_of(models.untrained(task, "paper", seed)) for task in ("trec", "sst2") for seed in (0, 1)
    }
    assert starts["trec", 0] == starts["sst2", 0] != starts["trec", 1]
    first, second = (effective_weights(models.untrained("sst2", way, 0)) for way in ("full", "mask"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "the same head"


def test_a_model_whose_parameters_are_gone_is_trained_again_to_the_same(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    before = masks_of(models.trained("trec", "mask", 0))
    assert before.sparsity > 0
    models.run("trec", "mask", 0).state.unlink()
    after = masks_of(models.trained("trec", "mask", 0))
    assert dissimilarity(before, after) == dict.fromkeys(before, 0.0)


def test_a_sweep_chooses_the_rate_of_each_variant_on_dev_and_goes_on_where_it_was(data, model, tmp_path, monkeypatch):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    scale = Scale(tasks=("trec",), seeds=(0,), rates=(1e-3, 1.0))
    variants = {name: sparsity.at_start(p, scale) for name, p in (("few", 0.05), ("many", 0.5))}
    one = sweep(models, variants, scale)
    trained: list[tuple[str, int]] = []

    def train(task, method, lr, seed, *more):
        trained.append((method.name, seed))
        return real(task, method, lr, seed, *more)

    real = training.train
    monkeypatch.setattr(training, "train", train)
    two = sweep(models, variants, replace(scale, seeds=(0, 1)))
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
    rows = [
        {"task": "trec", "variant": name, "test": 0.5, "deviation": 0.1}
        for name in ("bottom-up 1", "top-down 1", "all 2")
    ]
    layers.draw({"rows": rows}, tmp_path / "layers.svg")
    one_seed = {"task": "trec", "variant": "5%", "test": 0.5, "deviation": None}
    sparsity.draw({"rows": [one_seed]}, tmp_path / "sparsity.svg")
    assert all(f"<!-- trec, {name} -->" in (tmp_path / "layers.svg").read_text("utf-8") for name in layers.DIRECTIONS)
    assert "<!-- 5% -->" in (tmp_path / "sparsity.svg").read_text("utf-8")


def test_snapshots_are_taken_where_a_cycle_of_the_rate_ends(data, model, tmp_path, monkeypatch):
    setting = replace(command.Setting(data, str(model)), cycles=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    schedule = setting.schedule(optimizer, 12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 0.8536, 0.5, 0.1464] * 3, abs=1e-4)
    assert setting.as_json() != command.Setting(data, str(model)).as_json(), "and its results are told apart"

    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    dev = models.batches("sst2", "dev", 30)
    seen = []
    monkeypatch.setattr(ensembles, "train", lambda *given, **more: seen.append((given, more)) or real(*given, **more))
    real = training.train
    (logits,) = ensembles._snapshots("mask", models, Scale(cycles=3), [dev])
    assert logits.shape == (3, 30, 2)
    assert not torch.equal(logits[0], logits[2])
    ((given, _),) = seen
    assert given[4] == 6, "three cycles of two steps"


def test_an_ensemble_decides_in_the_way_that_is_best_on_dev(monkeypatch):
    votes = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[9.0, 0.0]]])  # by labels 1, by sums 0
    for label, best in ((1, {"labels"}), (0, {"logits", "probabilities"})):
        batches = [{"labels": torch.tensor([label])}]
        monkeypatch.setattr(Models, "batches", lambda *given, b=batches: b)
        for members in ("_masked", "_finetuned", "_snapshots"):
            monkeypatch.setattr(ensembles, members, lambda *given: [votes, votes])
        for row in ensembles.run(Models(command.Setting(Path(), ""), Path()), Scale())["rows"]:
            assert row["way chosen on dev"] in best
            assert row["test, ensemble"] == 1


def test_studies_look_at_the_models_of_every_seed(data, model, tmp_path, monkeypatch):
    models = Models(command.Setting(data, str(model)), tmp_path)
    studies = {
        line: {"full", "mask"},
        representations: {"full", "mask", "paper"},
        controls: {"mask", "paper"},
        curve: {"full", "mask"},
        dissimilarity_study: {"mask", "paper"},
    }
    for study, ways in studies.items():
        seen = set()

        def trained(models, task, way, seed, seen=seen):
            seen.add((way, seed))
            return models.untrained(task, way, seed)

        monkeypatch.setattr(Models, "trained", trained)
        study.run(models, Scale(rows=30, points=2, curve_steps=2, seeds=(3, 5)))
        assert seen == {(way, seed) for way in ways for seed in (3, 5)}


def test_a_control_has_the_head_that_its_mask_was_trained_with_and_pretrained_weights(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    trained = models.trained("sst2", "mask", 0)
    pretrained = effective_weights(models.untrained("sst2", "full", 0))
    found = effective_weights(controls.with_trained_head(models.untrained("sst2", "full", 0), trained))
    head = {name for name in found if not torch.equal(found[name], pretrained[name])}
    assert head == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(found[name], effective_weights(trained)[name]) for name in head)


def test_every_seed_has_its_own_draws_and_starts(data, model, tmp_path, monkeypatch):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    drawn, batches, started = [], [], []
    monkeypatch.setattr(controls, "shuffled", lambda masks, seed, *among: drawn.append(seed) or masks)
    monkeypatch.setattr(curve, "training_batches", lambda rows, seed, *more: batches.append(seed) or [[0, 1]])
    real = dissimilarity_study.dissimilarity
    monkeypatch.setattr(
        dissimilarity_study, "dissimilarity", lambda *masks, by: started.append(masks[2]) or real(*masks, by=by)
    )
    for study in (controls, curve, dissimilarity_study):
        study.run(models, Scale(recipes=("paper",), rows=30, points=2, curve_steps=1, seeds=(3, 5)))
    assert drawn == [3, 5]
    assert batches == [3, 5]
    assert started == [masks_of(models.untrained("trec", "paper", seed)) for seed in (3, 5)]


def test_movement_is_the_mean_over_seeds(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    both, *alone = (movement.run(models, Scale(every=1, seeds=seeds))["rows"] for seeds in ((0, 1), (0,), (1,)))
    assert [row["step"] for row in both] == [0, 1, 2]
    assert both[0]["iou_since"] is both[0]["deviation"] is None
    overlaps = [rows[2]["iou_since"] for rows in alone]
    assert overlaps[0] != overlaps[1]
    assert both[2]["iou_since"] == pytest.approx(sum(overlaps) / 2, abs=1e-4)
    assert both[2]["deviation"] == pytest.approx(abs(overlaps[0] - overlaps[1]) / 2**0.5, abs=1e-4)


def test_figures_of_one_seed_have_no_bars():
    rows = [over_seeds("test", values) for values in ([0.5, 0.7], [0.6])]
    assert bars(rows[:1]) == [0.1414]
    assert bars(rows[1:]) is None


def test_parts_that_are_drawn_anew_are_others_in_each_seed_and_the_rest_is_pretrained(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path)

    def weights(part, way, seed):
        method = reinitialized.without(part, way)
        return effective_weights(training.untrained(TASKS["trec"], method, seed, models.setting))

    pretrained = weights("nothing", "full", 0)
    for way in ("full", "mask"):
        drawn = weights("attention", way, 0)
        changed = {name for name, own in drawn.items() if not torch.equal(own, pretrained[name])}
        matrices = {name for name in pretrained if ".attention." in name and name.endswith("dense.weight")}
        assert changed >= matrices
        assert all(".attention." in name for name in changed)
        again, other = weights("attention", way, 0), weights("attention", way, 1)
        name = min(matrices)
        assert torch.equal(drawn[name], again[name])
        assert not torch.equal(drawn[name], other[name])
    assert reinitialized.without("attention", "mask").note != reinitialized.without("nothing", "mask").note


def test_a_rate_is_chosen_on_dev_and_one_that_is_alone_costs_no_training(data, model, tmp_path):
    models = Models(command.Setting(data, str(model)), tmp_path, steps=2)
    assert models.chosen_rate("custrev", "mask") == 5e-4
    assert not (tmp_path / "runs.jsonl").exists()
    chosen = models.chosen_rate("custrev", "full")
    tries = {lr: models.run("custrev", "full", 0, lr).read()["dev"] for lr in (1e-4, 3e-4, 1e-3)}
    assert tries[chosen] == max(tries.values())


def test_sentiment_of_others_is_read_split_and_written_the_same_each_time(tmp_path):
    reviews = [f"{i % 2} it is n't bad \xe9 \x85 {i} ." for i in range(1010)]
    empty = "1 "  # as the last line of the real file
    (tmp_path / "custrev.all").write_text("\n".join([*reviews[:-1], reviews[0], empty]) + "\n", "latin-1")
    folder = tmp_path / "sentiment"
    folder.mkdir()
    for split, count in (("val", 30), ("test", 4600)):
        lines = [f"tweet {i} \u2028 of @user" for i in range(count)]
        (folder / f"{split}_text.txt").write_text("\n".join(lines) + "\n", "utf-8")
        (folder / f"{split}_labels.txt").write_text("\n".join(str(i % 3) for i in range(count)) + "\n", "utf-8")
    for data in ("one", "two"):
        arguments = ["--custrev", tmp_path / "custrev.all", "--tweets", folder, "--data", tmp_path / data]
        sentiment.main([str(argument) for argument in arguments])
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*"))
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)

    def rows(name, split):
        lines = (tmp_path / "one" / name / f"{split}.jsonl").read_text("utf-8").splitlines()
        return {(row["text"], row["label"]) for row in map(json.loads, lines)}

    counts = {name: [len(rows(name, split)) for split in ("train", "dev", "test")] for name in ("custrev", "tweets")}
    assert counts == {"custrev": [10, 500, 500], "tweets": [3067 - 20 - 1500, 20, 1500]}
    assert ("it is n't bad \xe9 \x85 7 .", 1) in rows("custrev", "train") | rows("custrev", "dev") | rows(
        "custrev", "test"
    )
    assert rows("tweets", "dev") == {(f"tweet {i} \u2028 of @user", i % 3 // 2) for i in range(30) if i % 3 != 1}
    assert not rows("tweets", "dev") & (rows("tweets", "train") | rows("tweets", "test"))


def test_what_is_no_sentiment_data_is_refused_before_anything_is_written(tmp_path, capsys):
    for arguments, message in (
        ([], "nothing to read"),
        (["--tweets", str(tmp_path)], f"no such file: {tmp_path / 'val_text.txt'}, {tmp_path / 'val_labels.txt'}"),
    ):
        with pytest.raises(SystemExit):
            sentiment.main([*arguments, "--data", str(tmp_path / "data")])
        assert message in capsys.readouterr().err
    (tmp_path / "other").write_text("1 good\n2 neither\n", "latin-1")
    for split in ("val", "test"):
        (tmp_path / f"{split}_text.txt").write_text("one\ntwo\n", "utf-8")
        (tmp_path / f"{split}_labels.txt").write_text("0\n", "utf-8")
    for option, path, message in (
        ("--custrev", tmp_path / "other", "other:2: expected 0 or 1 and a text, got '2 neither'"),
        ("--tweets", tmp_path, "val_text.txt has 2 tweets, val_labels.txt 1 labels"),
    ):
        with pytest.raises(SystemExit, match=message):
            sentiment.main([option, str(path), "--data", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_data_that_are_not_there_are_named(tmp_path, model):
    models = Models(command.Setting(tmp_path, str(model)), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"task 'custrev' needs .*test\.jsonl.* docs/reproduction.md where"):
        models.batches("custrev", "test")


def test_studies_that_are_none_and_missing_data_are_refused(tmp_path, capsys):
    for arguments, message in ((["lines"], "there is no study"), (["line"], "--data is missing")):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--results", str(tmp_path)])
        assert message in capsys.readouterr().err
