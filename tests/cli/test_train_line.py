"""The line that `peft-mask train` is started with, and the words it answers with."""

import pytest
import yaml

from peft_mask.recipes.from_file import read, split
from peft_mask.recipes.tasks import shown
from tests.project.test_documents import ROOT


@pytest.mark.parametrize(
    "line",
    [
        "--seed 1 --output_dir b task.yaml",
        "--seed 1 task.yaml --output_dir b",
        "--seed=1 task.yaml --output_dir=b",
        "--text_column=text task.yaml --output_dir b --seed 1",
        "--output_dir b --use_cpu task.yaml --seed 1",
        "--seed 1 --train_file rows.csv fields --output_dir b",
    ],
)
def test_the_file_is_found_wherever_it_stands(task, here, line):
    task()
    (here / "fields").write_text((here / "task.yaml").read_text())
    words = line.split()
    file, flags = split(words)
    assert file == ("fields" if "fields" in words else "task.yaml")
    assert flags == [word for word in words if word != file]
    fields = read(file, flags).fields
    assert (fields["seed"], fields["output_dir"], fields["task"]) == (1, "b", "text-classification")


def test_a_file_in_the_middle_is_trained(task, here, run):
    assert run("train", "--seed", "1", "--output_dir", "b", task()).code == 0
    assert yaml.safe_load((here / "b" / "task.yaml").read_text())["seed"] == 1


@pytest.mark.parametrize("line", ["--task chat --train_file a.json", "--task chat --output_dir rows.csv --bf16", ""])
def test_a_value_of_a_flag_is_no_file_of_fields(here, line):
    assert split(line.split()) == (None, line.split())


def test_a_name_that_may_be_the_file_or_a_value_is_refused(task, refused):
    message = refused("train", "--seed", "1", "--text_column", "text", task())
    assert "whether 'task.yaml' is the file or one of the values of --text_column" in message
    assert message.endswith("the file's name comes first: peft-mask train task.yaml --text_column ...")


@pytest.mark.parametrize(
    ("own", "flags", "message"),
    [
        (
            {"task": "text_classification"},
            [],
            "task.yaml: there is no task 'text_classification'; did you mean 'text-classification'? say task: text-",
        ),
        ({}, ["--task", "Chat"], "error: there is no task 'Chat'; did you mean 'chat'? say task: text-"),
        ({"task": None}, [], "task.yaml: no task is named: say task: text-"),
        (
            {"r": 8},
            [],
            "task.yaml: there is no field 'r', for a mask has no rank: its size is target_sparsity, the share",
        ),
        ({"max_steps": "twenty"}, [], "task.yaml: argument --max_steps/--max-steps: invalid int value: 'twenty'"),
        ({}, ["--max_steps", "twenty"], "error: argument --max_steps/--max-steps: invalid int value: 'twenty'"),
        ({"seed": 1}, ["--seed", "one"], "error: argument --seed: invalid int value: 'one'"),
    ],
)
def test_what_is_wrong_is_named_with_the_file_it_is_in(task, refused, own, flags, message):
    assert message in refused("train", task(**own), *flags)


def test_bytes_of_the_masks_are_those_that_inspect_counts(task, run):
    figures = run("train", task(max_steps=1), "--json").data["figures"]
    counted = run("inspect", "out", "--json").data["bytes"]
    assert (figures["mask_bytes"], figures["head_bytes"]) == (counted["masks"], counted["beside"])
    assert figures["file_bytes"] == counted["file"]


def test_one_step_is_one(task, run):
    said = run("train", task(max_steps=1)).err
    assert "training: 1 step\n" in said


def test_labels_are_shown_as_far_as_they_fit():
    assert shown(["a"]) == "a"
    assert shown(["ab", "cd", "ef"], 6) == "ab, cd, ..."
    assert shown(["ab", "cd", "ef"], 10) == "ab, cd, ef"
    assert shown(["long name", "b"], 3) == "long name, ..."


def test_the_page_of_training_lists_what_is_written(task, here, run):
    assert run("train", task(max_steps=1)).code == 0
    page = (ROOT / "docs" / "train.md").read_text("utf-8")
    listed = page.partition("## What is written")[2].partition("## ")[0]
    assert [path.name for path in (here / "out").iterdir() if path.is_file() and f"`{path.name}`" not in listed] == []
