"""The command for the paper's eleven tasks, known to start: tiny random models, a few rows with the columns of each."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

from peft_mask import Masks
from peft_mask.recipes import script
from peft_mask.recipes.script import ScriptArguments
from peft_mask.recipes.token_classification import TagArguments
from reproduction import paper
from reproduction.paper import TASKS
from tests.text_rows import write_jsonl


@pytest.fixture(scope="module")
def encoder(tiny_bert, tmp_path_factory):
    """A BERT of three blocks, so that one is left above the two that are never masked."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return folder


def rows_of(name, count=40):
    """Rows with the columns of the task's data set."""
    task, columns = TASKS[name], TASKS[name].columns
    if task.arguments is ScriptArguments:
        endings = {f"ending{i}": f"sat {i}" for i in range(4)}
        return [{"sent1": "a cat ran", "sent2": "it", **endings, "label": i % 4} for i in range(count)]
    if task.arguments is TagArguments:
        tags = [["B-x", "O"], ["O", "B-y"]]
        names = columns["text_column"], columns["label_column"]
        return [dict(zip(names, (["cat", "oak"], tags[i % 2]), strict=True)) for i in range(count)]
    texts = columns["text_column"]
    return [{**dict.fromkeys(texts, f"oak {i}"), columns["label_column"]: i % 2} for i in range(count)]


def run(name, encoder, folder, *more):
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", rows_of(name))
    places = ["--model_name_or_path", encoder, "--data", str(folder), "--output_dir", str(folder / "out")]
    short = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--per_device_train_batch_size", "8"]
    quiet = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
    return paper.main(["--task", name, *places, *short, *quiet, *more])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TASKS if name not in ("mrpc", "ner", "swag")]


@pytest.mark.parametrize("name", ["mrpc", "ner", "swag", *SLOW])
def test_every_task_starts_and_trains_masks_alone(encoder, tmp_path, name):
    figures = run(name, encoder, tmp_path)
    assert 0 <= figures["dev"][TASKS[name].metric] <= 1
    assert figures["lr"] == 1e-3
    assert figures["sparsity"] == pytest.approx(0.05, abs=0.02)
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8")) == figures
    masks = Masks.load(tmp_path / "out")
    blocks = {name for name in masks if "encoder" in name}
    assert {name.split(".")[3] for name in blocks} == {"2"}
    assert len(blocks) == 6
    pooler = set() if TASKS[name].arguments is TagArguments else {"bert.pooler.dense"}  # a tagger has none
    assert set(masks) - blocks == {"classifier", *pooler}
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) in (1, 2)  # the best, and the last


def test_what_was_trained_loads_onto_a_fresh_base_and_computes_the_same(encoder, tmp_path):
    run("mrpc", encoder, tmp_path)
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    logits = []
    for seed in (1, 2):  # the random head of the base is another
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(encoder)
        with torch.inference_mode():
            logits.append(PeftModel.from_pretrained(base, tmp_path / "out").eval()(**inputs).logits)
    assert torch.equal(*logits)


def test_full_fine_tuning_is_the_same_command_with_another_rate(encoder, tmp_path):
    figures = run("mrpc", encoder, tmp_path, "--method", "finetune")
    assert figures["lr"] == 5e-5
    assert "sparsity" not in figures
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_tasks_are_those_of_the_paper_with_their_metrics():
    assert list(TASKS) == ["mrpc", "sst2", "cola", "rte", "qnli", "sem", "trec", "ag", "pos", "ner", "swag"]
    others = {name: task.metric for name, task in TASKS.items() if task.metric != "accuracy"}
    assert others == {"cola": "matthews_correlation", "ner": "f1"}


@pytest.mark.parametrize(("name", "dev"), [("trec", 4), ("ag", 8), ("sst2", 3)])
def test_development_data_come_from_training_data_where_there_are_none(monkeypatch, name, dev):
    rows = Dataset.from_list(rows_of(name))
    found = {"train": rows, "test": rows}
    if name == "sst2":
        found["validation"] = rows.select(range(3))
    asked = []
    monkeypatch.setattr(script, "load_dataset", lambda *names, revision: asked.append((*names, revision)) or found)
    _, splits = paper.splits_of(paper.PaperArguments(name))
    assert asked == [(*TASKS[name].dataset, None, None)[:3]]
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 40 - dev * (name != "sst2"),
        "validation": dev,
    }


@pytest.mark.parametrize("name", ["sem", "pos"])
def test_data_that_are_not_on_the_hub_are_asked_for(name, tmp_path):
    with pytest.raises(ValueError, match=f"the data of {name} are not on the Hub: give a folder"):
        paper.splits_of(paper.PaperArguments(name))
    with pytest.raises(ValueError, match=r"expected one file 'train' in '.*' that ends in one of .csv"):
        paper.splits_of(paper.PaperArguments(name, data=str(tmp_path)))
