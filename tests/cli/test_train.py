"""`peft-mask train`: what a file and flags say is learned, and what cannot be is refused in one line."""

import json
import re
import shutil
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_mask import MaskConfig, Masks, recipes
from peft_mask.recipes.fields import read_yaml, words_of, write_yaml
from peft_mask.recipes.from_file import read
from peft_mask.recipes.mask_arguments import NOT_TYPED, MaskArguments, mask_config
from peft_mask.recipes.tasks import TASKS
from tests.chat_models import CHATS, tiny_chat_model, write
from tests.processes import launch


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_is_trained_and_what_comes_next_works(task, here, tiny_bert, run):
    said = run("train", task())
    assert said.code == 0
    assert "test accuracy" in said.out
    assert "rows to learn from: 24 of --train_file rows.csv" in said.err
    assert "labels: 2: pet, tree" in said.err
    assert "step 2 of 2, " in said.err
    assert not (here / "out" / "tokenizer.json").exists()  # it is the base's
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    assert PeftModel.from_pretrained(base, "out").get_base_model().classifier.original_module.out_features == 2
    following = said.out.partition("next:\n")[2].splitlines()
    assert [line.split()[:2] for line in following] == [["peft-mask", "inspect"], ["peft-mask", "merge"]]
    assert [run(*line.split()[1:]).code for line in following] == [0, 0]
    merged = AutoModelForSequenceClassification.from_pretrained("out-merged")
    assert merged.config.id2label == {0: "pet", 1: "tree"}


def test_the_card_has_the_results_and_a_command_that_trains_the_same(task, here, run):
    figures = run("train", task(), "--json").data["figures"]
    card = ModelCard.load(here / "out" / "README.md")
    assert {row.metric_type: row.metric_value for row in card.data.eval_results}["accuracy"] == figures["test_accuracy"]
    command = next(line for line in card.text.splitlines() if line.startswith("peft-mask train"))
    shutil.move("out", "first")
    assert run(*command.split()[1:]).code == 0
    assert same(here / "out", here / "first")


def test_what_was_run_lies_beside_the_adapter_and_runs_again(task, here, run):
    assert run("train", task(), "--target_sparsity", "0.02", "--hub_token", "hf_secret").code == 0
    left = (here / "out" / "task.yaml").read_text()
    assert yaml.safe_load(left)["target_sparsity"] == 0.02
    assert "hf_secret" not in left
    assert "hf_secret" not in (here / "out" / "README.md").read_text()
    assert run("train", "out/task.yaml", "--output_dir", "again").code == 0
    assert same(here / "out", here / "again")


def test_flags_win_over_the_file_and_need_none(task, here, run):
    file = task(target_sparsity=0.01)
    assert run("train", file, "--target_sparsity=0.05", "--output-dir", "flagged", "--json").code == 0
    assert PeftConfig.from_pretrained("flagged").target_sparsity == 0.05
    flags = words_of({**yaml.safe_load((here / file).read_text()), "target_sparsity": 0.05, "output_dir": "alone"})
    assert run("train", *flags).code == 0
    assert same(here / "flagged", here / "alone")


def test_json_is_all_that_is_printed_and_has_every_evaluation(task, here, run):
    more = ["--validation_file", "rows.csv", "--eval_strategy", "steps", "--eval_steps", "1"]
    said = run("train", task(), *more, "--json")
    data = json.loads(said.out)
    assert [row["step"] for row in data["evaluations"]] == [1, 2]
    assert 0 <= data["evaluations"][0]["eval_accuracy"] <= 1
    assert data["figures"]["file_bytes"] == (here / "out" / "adapter_model.safetensors").stat().st_size
    assert data["fields"]["validation_file"] == "rows.csv"
    assert said.err.count("validation loss") == 2


def test_a_validation_file_is_scored_after_every_epoch_if_nothing_else_is_said(task, run):
    said = run("train", task(max_steps=None, num_train_epochs=2, validation_file="rows.csv"), "--json")
    assert [row["epoch"] for row in said.data["evaluations"]] == [1, 2]


def test_the_model_is_loaded_as_is_said(task, here, run):
    own = {"model_init_kwargs": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}}
    assert run("train", task(**own)).code == 0
    assert run("train", task(output_dir="other")).code == 0
    assert not same(here / "out", here / "other")
    assert run("train", "out/task.yaml", "--output_dir", "again").code == 0
    assert same(here / "out", here / "again")


def test_words_are_tagged(task, here, run):
    (here / "tags.conll").write_text("\n\n".join("a\tO\ncat\tB-x" if i % 2 else "oak\tO" for i in range(12)))
    data = run("train", task(task="token-classification", train_file="tags.conll", test_file=None), "--json").data
    assert {"test_accuracy", "test_f1"} <= data["figures"].keys()


def test_plain_text_is_learned(task, here, run):
    tiny_chat_model(here / "llama")
    own = {"task": "causal-lm", "model_name_or_path": "llama", "test_file": None, "block_size": 16}
    figures = run("train", task(**own), "--candidates", "all", "--target_sparsity", "0.05", "--json").data["figures"]
    assert figures["test_perplexity"] != figures["test_perplexity_without_mask"]
    assert Masks.load("out").sparsity == pytest.approx(0.05, rel=0.1)


def test_chats_are_learned_with_what_their_trainer_can_do(task, here, run):
    pytest.importorskip("trl", reason="TRL is not installed")
    tiny_chat_model(here / "llama")
    write(here / "chats.jsonl", CHATS)
    own = {"task": "chat", "model_name_or_path": "llama", "train_file": "chats.jsonl", "test_file": None}
    said = run("train", task(**own), "--max_length", "200", "--merge_to", "merged", "--json")
    assert {"test_perplexity_before", "test_perplexity_after"} <= said.data["figures"].keys()
    assert (here / "merged" / "model.safetensors").is_file()


def test_a_chat_model_in_four_bits_is_merged_in_four_bits(task, here, run):
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_chat_model(here / "llama", width=64)
    write(here / "chats.jsonl", CHATS)
    own = {"task": "chat", "model_name_or_path": "llama", "train_file": "chats.jsonl", "test_file": None}
    said = run("train", task(**own), "--max_length", "200", "--load_in_4bit", "true", "--json")
    command = said.data["next"][1]
    assert "--quantize nf4" in command
    assert "quantized" in run(*command.split()[1:]).out


def test_chats_without_their_trainer_say_what_to_install(task, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "task: chat needs TRL, which cannot be imported" in refused("train", task(task="chat"))


def test_a_training_without_data_sets_says_what_to_install(task, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft_mask.recipes.from_file", None)
    monkeypatch.delattr(recipes, "from_file", raising=False)
    assert "a training needs more than the package: pip install 'peft-mask[train]'" in refused("train", task())


def test_an_interrupted_training_is_resumed_and_ends_as_if_it_had_not_been(task, here, run, refused):
    file = task(max_steps=4, save_strategy="steps", save_steps=2)
    assert run("train", file).code == 0
    shutil.copytree("out", "whole")
    shutil.rmtree("out/checkpoint-4")
    for path in (here / "out").glob("adapter_*"):
        path.unlink()
    assert "holds checkpoints of a training that did not end; go on with --resume_from" in refused("train", file)
    said = run("train", file, "--resume_from_checkpoint", "true")
    assert "training: 4 steps from step 2 on" in said.err
    assert same(here / "out", here / "whole")


@pytest.mark.slow
def test_of_several_processes_the_first_writes_and_prints(task, here):
    file = here / task(
        output_dir=str(here / "out"), train_file=str(here / "rows.csv"), test_file=str(here / "rows.csv")
    )
    printed = launch("peft_mask/__main__.py", "train", str(file), "--json")
    assert json.loads(printed)["figures"]["file_bytes"] == (here / "out" / "adapter_model.safetensors").stat().st_size
    assert yaml.safe_load((here / "out" / "task.yaml").read_text())["task"] == "text-classification"


@pytest.mark.parametrize(
    ("own", "flags", "message"),
    [
        ({"target_sparcity": 0.1}, [], r"task.yaml: there is no field 'target_sparcity'; did you mean 'target_spars"),
        ({}, ["--max_step", "3"], r"error: there is no field 'max_step'; did you mean 'max_steps'\?"),
        ({"qqq": 1}, [], r"there is no field 'qqq'\. --help with a task lists all"),
        ({}, ["more.yaml"], r"'more.yaml' belongs to no field: give one file at most, then --field value"),
        ({}, ["--output_dir"], r"--output_dir.*expected one argument"),
        ({"task": None}, [], r"no task is named: say task: text-classification or token-classification or"),
        ({"task": "sing"}, [], r"there is no task 'sing': say task: text-classification or"),
        ({}, ["--task", "sing"], r"there is no task 'sing'"),
        ({"output_dir": None}, [], r"say where to write: output_dir, a new folder"),
        ({"model_name_or_path": None}, [], r"the following arguments are required: --model_name_or_path"),
        ({"model_name_or_path": "./gone"}, [], r"--model_name_or_path \./gone: "),
        ({"max_steps": "ten"}, [], r"--max_steps.*invalid int value: 'ten'"),
        ({"candidate_rule": "best"}, [], r"--candidate_rule.*invalid choice: 'best'"),
        ({"candidates": "some"}, [], r"--candidates some: expected a fraction such as 0.1, or 'all'"),
        ({"model_init_kwargs": "[1]"}, [], r"--model_init_kwargs \[1\]: expected a JSON object, such as '{\"dtype"),
        ({"model_init_kwargs": {"wings": 2}}, [], r"unexpected keyword argument 'wings'"),
        ({"target_sparsity": 2}, [], r"target_sparsity must be a finite number"),
        ({"target_modules": ["all-linear", "x"]}, [], r"--target_modules all-linear stands for modules itself"),
        ({"train_file": "gone.csv"}, [], r"--train_file gone.csv: there is no such file"),
        ({"train_file": None, "test_file": None}, [], r"give either --dataset_name .* or --train_file"),
        ({"text_column": "body"}, [], r"there is no column \['body'\]; the data have \['text', 'label'\]"),
        ({"label_column": "kind"}, [], r"there is no column \['kind'\]; the data have \['text', 'label'\]"),
        ({"train_file": "empty.csv"}, [], r"--train_file empty.csv: there are no rows, only a header or nothing"),
        ({"validation_file": "fish.csv"}, [], r"fish.csv: row 1: label 'fish' does not occur in the training data"),
        ({"eval_strategy": "steps"}, [], r"eval_dataset"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(task, here, run, own, flags, message):
    (here / "empty.csv").write_text("text,label\n")
    (here / "fish.csv").write_text("text,label\na cod,fish\n")
    said = run("train", task(**own), *flags)
    assert (said.code, said.out) == (2, "")
    last = said.err.splitlines()[-1]
    assert last.startswith("peft-mask train: error: ")
    assert re.search(message, last), last
    assert not (here / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: chat\nmax_steps: [1", "task.yaml: line 2 is not YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: b: c", "task.yaml: line 1 is not YAML (mapping values are not allowed here)"),
        ("task: a\nseed: 1\ntask: b", "task.yaml: 'task' stands in line 1 and in line 3; keep one of them"),
        ("- task", "task.yaml: expected a field and its value in each line, such as 'max_steps: 100'"),
        ("", "task.yaml: expected a field and its value in each line"),
        (b"\xff\xfe", "task.yaml: this is no text in UTF-8"),
        (None, "task.yaml: there is no such file (working directory "),
    ],
)
def test_a_file_that_holds_no_fields_is_refused_with_its_line(here, refused, content, message):
    if content is not None:
        (here / "task.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused("train", "task.yaml")


def test_a_folder_is_no_file_of_fields(here, refused):
    assert f"{here}: this is a folder; name the file in it." in refused("train", here)


def test_an_adapter_is_not_written_over(task, here, run, refused):
    file = task()
    assert run("train", file).code == 0
    before = tensors(here / "out")
    assert "output_dir out: this folder holds an adapter; name a new one" in refused("train", file, "--seed", "1")
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(here / "out").items())
    assert "rows.csv: this is a file; name a new folder" in refused("train", file, "--output_dir", "rows.csv")


def test_help_fits_a_screen_and_with_a_task_lists_its_fields(run):
    short = run("train", "--help")
    assert short.code == 0
    assert len(short.out.splitlines()) <= 40
    assert max(map(len, short.out.splitlines())) <= 100
    assert [task for task in TASKS if task not in short.out] == []
    for task, own in (("text-classification", "--text_column"), ("causal-lm", "--block_size")):
        said = run("train", "--task", task, "--help").out
        assert [name for name in (own, "--target_sparsity", "--num_train_epochs") if f"  {name}" not in said] == []


def test_the_file_that_help_shows_is_understood(run, here):
    shown = run("train", "--help").out
    (here / "task.yaml").write_text(shown.partition("task.yaml:\n")[2].partition("\n\n")[0])
    training = read("task.yaml", ["--use_cpu", "true"])
    assert training.settings.num_train_epochs == 5
    assert training.arguments.target_sparsity == 0.005


def test_every_field_of_a_mask_that_can_be_typed_is_a_field_of_a_training():
    of_peft = {each.name for each in fields(PeftConfig)}
    assert {each.name for each in fields(MaskArguments)} == (
        {each.name for each in fields(MaskConfig)} - of_peft - NOT_TYPED
    )


@pytest.mark.parametrize(
    ("said", "name", "value"),
    [
        ({"target_modules": ["query", "value"]}, "target_modules", {"query", "value"}),
        ({"target_modules": ["all-linear"]}, "target_modules", "all-linear"),
        ({"candidates": "0.3"}, "candidates", 0.3),
        ({"candidates": "all"}, "candidates", None),
        ({"init_weights": "true"}, "init_weights", True),
        ({"binarizer": "threshold", "init_weights": "uniform"}, "init_weights", "uniform"),
        ({"portable": False}, "portable", False),
        ({}, "target_sparsity", 0.005),
    ],
)
def test_fields_of_a_mask_become_its_configuration(said, name, value):
    assert getattr(mask_config(MaskArguments(**said), "SEQ_CLS"), name) == value


def test_fields_become_words_that_a_parser_reads_as_they_were():
    said = {"task": "text-classification", "model_name_or_path": "m", "output_dir": "out", "use_cpu": True}
    said |= {"text_column": ["a", "b"], "portable": False, "target_sparsity": 1e-3, "lr_scheduler_kwargs": {"a": 1}}
    training = read(None, words_of(said))
    assert training.fields | {"lr_scheduler_kwargs": {"a": 1}} == said
    assert training.settings.lr_scheduler_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("pattern: 2:4", "pattern", "2:4"),  # YAML has 124
        ("target_sparsity: 1e-3", "target_sparsity", 0.001),  # and a text
        ("label_column: no", "label_column", "no"),  # and False
        ("portable: no", "portable", False),
        ("seed: ~", "seed", None),
        ("text_column: [1, on]", "text_column", ["1", "on"]),
        ("text_column: body", "text_column", ["body"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_a_field_is_what_is_written(here, line, name, value):
    (here / "task.yaml").write_text(f"task: text-classification\nmodel_name_or_path: m\noutput_dir: out\n{line}\n")
    training = read("task.yaml", [])
    if value is None:
        assert name not in training.fields
    else:
        assert getattr(training.arguments if hasattr(training.arguments, name) else training.settings, name) == value


def test_fields_that_are_written_are_read_again(here):
    said = {"task": "chat", "pattern": "2:4", "label_column": "no", "text_column": ["a", "1"], "seed": 3, "bf16": False}
    write_yaml(said, here / "out.yaml")
    assert words_of(read_yaml("out.yaml")) == words_of(said)
