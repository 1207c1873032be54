"""Labels, rows that are held out, and what the card says of a training."""

from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from peft_mask import Masks
from peft_mask.recipes import script
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.rows import check_filled, hold_out, label_names, label_numbers
from peft_mask.recipes.text_classification import TextArguments
from tests.text_rows import ROWS, run_script, write_csv


def labelled(labels, feature=None):
    features = Features({"label": feature}) if feature else None
    return Dataset.from_dict({"label": labels}, features=features)


@pytest.mark.parametrize(
    ("labels", "feature", "names", "numbers"),
    [
        (["b", "a", "b"], None, ["a", "b"], [1, 0, 1]),
        ([" b", "a", "b "], None, ["a", "b"], [1, 0, 1]),
        ([10, 9, -1], None, ["-1", "9", "10"], [2, 1, 0]),
        (["10", "9", "-1"], None, ["-1", "9", "10"], [2, 1, 0]),
        (["007", "7"], None, ["007", "7"], [0, 1]),
        (["nan", "inf"], None, ["inf", "nan"], [1, 0]),
        ([True, False], None, ["False", "True"], [1, 0]),
        ([0, 1, 0], ClassLabel(names=["tree", "pet"]), ["tree", "pet"], [0, 1, 0]),
        ([["b", "a"], []], None, ["a", "b"], [[1, 0], []]),
        ([[0], [1]], List(ClassLabel(names=["tree", "pet"])), ["tree", "pet"], [[0], [1]]),
    ],
)
def test_labels_are_numbered_in_the_order_of_their_names(labels, feature, names, numbers):
    rows = labelled(labels, feature)
    assert label_names(rows, "label") == names
    assert label_numbers(rows, "label", names) == numbers


def test_classes_are_matched_by_name_whatever_their_numbers_in_a_file():
    other = labelled([0, 1], ClassLabel(names=["pet", "tree"]))
    assert label_numbers(other, "label", ["tree", "pet"]) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None], "the data: row 2: column 'label' is empty; fill it in or leave the row out"),
        (["a", "a"], "column 'label' holds 'a' alone; classification needs two classes or more"),
        ([0.5, 1.0], "holds numbers such as 0.5, as for regression, which is not supported"),
        (["1", "2.5"], "holds numbers such as 2.5, as for regression, which is not supported"),
        ([[["a"]], [["b"]]], "holds objects; classification needs classes: texts or whole numbers"),
        ([{"a": 1}, {"a": 2}], "holds objects; classification needs classes"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_names(labelled(labels), "label")


def test_a_label_that_training_lacks_is_named_with_its_row():
    with pytest.raises(ValueError, match="row 2: label 'c' does not occur in the training data, only a, b"):
        label_numbers(labelled(["a", "c"]), "label", ["a", "b"])


def test_a_row_of_no_class_is_named():
    rows = labelled([0, -1], ClassLabel(names=["a", "b"]))  # SNLI's way of saying that nobody knows
    with pytest.raises(ValueError, match="row 2: column 'label' holds -1, the number of no class; leave rows without"):
        label_names(rows, "label")


def test_a_missing_column_is_named_beside_those_there_are():
    with pytest.raises(ValueError, match=r"there is no column \['text'\]; the data have \['label'\]"):
        check_filled(labelled(["a"]), ["label", "text"])


@pytest.mark.parametrize("counts", [{"a": 80, "b": 20}, {"a": 6, "b": 4}, {"a": 30, "b": 5, "c": 1}, {"a": 2, "b": 38}])
def test_each_label_has_its_share_of_the_rows_held_out_and_a_single_row_stays(counts, capsys):
    labels = [label for label, count in counts.items() for _ in range(count)]
    rows = labelled(labels).add_column("row", list(range(len(labels))))
    parts = hold_out(rows, "label", seed=0)
    assert sorted(parts["train"]["row"][:] + parts["test"]["row"][:]) == rows["row"][:]
    assert parts["train"].column_names == parts["test"].column_names == rows.column_names
    assert set(parts["train"]["label"]) == set(labels)
    held = Counter(parts["test"]["label"])
    assert held.total() == max(len(labels) / 10, 2) or "c" in counts
    for label, count in counts.items():
        assert abs(held[label] - held.total() * count / len(labels)) < 1
    single = [label for label, count in counts.items() if count == 1]
    assert ("labels whose only row stays in training: c (1 in all)." in capsys.readouterr().out) == bool(single)
    assert not any(held[label] for label in single)
    again = hold_out(rows, "label", seed=0)
    assert again["test"]["row"][:] == parts["test"]["row"][:]


def test_every_class_of_many_can_be_held_out():
    labels = [f"{number}" for number in range(20) for _ in range(3)]
    parts = hold_out(labelled(labels), "label", seed=0)
    assert len(parts["test"]) == 20  # a tenth would be six
    assert Counter(parts["test"]["label"]) == dict.fromkeys(labels, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "a"], "3 rows are too few to hold a tenth out for the test; expected 10 or more, or a --test_file"),
        ([str(number) for number in range(10)], "every label has one row, .* is it the column of the labels?"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        hold_out(labelled(labels), "label", seed=0)


def test_a_label_of_minus_one_is_hidden_on_the_hub_and_a_class_in_a_file():
    test = labelled([-1, 0, 1])
    splits = {"train": labelled([-1, 0, 1]), "validation": labelled([0]), "test": test}
    assert script.choose_test_split(splits, "label", seed=0) == "validation"
    test.info.description = "--test_file a.jsonl"
    assert script.choose_test_split(splits, "label", seed=0) == "test"


@pytest.mark.parametrize("token", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-tok", "hf_secret"]])
def test_the_command_in_the_card_is_the_one_that_was_typed_without_the_token(token):
    typed = ["--model_name_or_path", "a b", "--train_file", "../x.csv", "--output_dir", "out"]
    _, settings = script.parse(TextArguments, "", [*typed, *token])
    assert settings.hub_token == "hf_secret"
    expected = (
        "python -m examples.text_classification --model_name_or_path 'a b' --train_file ../x.csv --output_dir out"
    )
    assert command_of(TextArguments, [*typed[:4], *token, *typed[4:]], settings) == expected
    assert command_of(TextArguments, typed, TrainingArguments("out")) == expected


def test_the_card_says_how_the_adapter_was_trained_and_loads_it_with_the_names(tiny_bert, tmp_path):
    train, out = write_csv(tmp_path / "train.csv", ROWS), tmp_path / "out"
    (out / "README.md").parent.mkdir()
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Pets\n", encoding="utf-8")
    for _ in range(2):  # a second training writes over the first
        figures = run_script(tiny_bert, out, "--train_file", train, "--hub_token", "hf_secret")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert "# Pets" in card.text
    assert "hf_secret" not in str(card)
    assert card.text.count("## How it was trained") == 1
    assert f"python -m examples.text_classification --model_name_or_path {tiny_bert} --output_dir {out}" in card.text
    assert f"| train rows | 21 of --train_file {train} |" in card.text
    assert f"| test rows | 3 of --train_file {train} |" in card.text
    assert f"| accuracy | {figures['accuracy']:.4f} |" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == figures["accuracy"]
    assert results["accuracy"].dataset_name == "train.csv"

    code = next(block for block in card.text.split("```python\n") if "from_pretrained" in block).split("```")[0]
    names = {}
    exec(code.replace("this/repository", str(out)), names)
    assert names["model"].config.id2label == {0: "pet", 1: "tree"}


def test_what_is_pushed_has_the_card_of_the_training(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/pets"))
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **about: self.create_model_card(tasks=about.get("tasks")))
    train = write_csv(tmp_path / "train.csv", ROWS)
    run_script(tiny_bert, tmp_path / "out", "--train_file", train, "--push_to_hub", "true", "--save_strategy", "no")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert text.count("## How it was trained") == 1
    assert text.count("## A mask") == 1


def test_a_card_that_cannot_be_read_costs_no_training(tmp_path):
    Masks({"layer": torch.tensor([[True, False]])}).save(tmp_path)
    (tmp_path / "README.md").write_text("---\nmodel-index: 1\n---\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="the model card in .* does not say how it was trained: "):
        write_card(tmp_path, "python", "text-classification", "a.csv", figures={"accuracy": 1.0}, facts={})
    assert (tmp_path / "README.md").read_text("utf-8") == "---\nmodel-index: 1\n---\n"
