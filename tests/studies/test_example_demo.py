"""The demo of the examples, on a tiny random model: what it trains, compares, prints and writes."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from examples.demo import __main__ as demo
from examples.demo import methods, tasks
from examples.demo.methods import METHODS, Result
from examples.demo.report import table
from examples.demo.tasks import DATA, BaseModel, Task
from peft_mask import MaskConfig
from peft_mask.cli.main import main
from peft_mask.recipes.tagging import IGNORED, read_columns
from peft_mask.training.optimizer import HEAD_LR


@pytest.fixture
def few_sentences(tmp_path_factory, monkeypatch):
    """The demo's data, of each task a few short sentences that hold all of its tags; the test asks for some of them."""
    folder = tmp_path_factory.mktemp("data")
    for name in (demo.FIRST, demo.SECOND):
        (folder / name).mkdir()
        chosen, seen = [], set()
        for sentence in read_columns(DATA / name / "train.conll"):
            tags = {tag for _, tag in sentence}
            if len(sentence) < 15 and not tags <= seen:
                seen |= tags
                chosen.append(sentence)
        for split, sentences in (("train", chosen), ("test", chosen[1:])):
            text = "\n".join("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences)
            (folder / name / f"{split}.conll").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tasks, "DATA", folder)


def test_demo_trains_reports_and_serves(tiny_bert, few_sentences, tmp_path, capsys, monkeypatch):
    # Two steps switch nothing off. With masks that start at random the comparisons are of something.
    monkeypatch.setattr(
        methods, "MaskConfig", partial(MaskConfig, init_weights=False, target_sparsity=0.1, candidates=None)
    )
    assert demo.main(["--model", tiny_bert, "--steps", "2", "--threads", "1", "--output", str(tmp_path)]) == 0

    output = capsys.readouterr().out
    assert output.count("  equal  ") == 7
    assert "DIFFERENT" not in output
    assert "(0 weights written over)" not in output
    # a first result before the second training, what each step is for, and no dictionaries of Trainer's
    assert re.search(r"A first look, at \d+ test sentences: token accuracy 0\.\d\d.*-> test", output, re.S)
    assert [f"[{step}/5]" in output for step in range(1, 6)] == [True] * 5
    assert "{'" not in output
    *_, first, second = output.splitlines()
    for line, name in ((first, "inspect"), (second, "report")):
        program, typed, *arguments = line.split()
        assert (program == "python" or Path(program).is_file(), typed) == (True, name)
        assert main([typed, *arguments]) == 0
    assert str(tmp_path / "accuracy_against_bytes.png") in output
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) <= 120
    rows = json.loads((tmp_path / "results.json").read_text())
    names = [row["method"] for row in rows if row["task"] == demo.FIRST]
    assert names == [demo.PROBE, "full fine-tuning", "LoRA r=8", "mask"]
    for row in rows:
        assert row["metric"] == {demo.FIRST: "token accuracy", demo.SECOND: "span F1"}[row["task"]]
        assert 0 <= row["score"] <= 1
        assert (row["sparsity"] is not None) == (row["method"] == "mask")
        assert row["head_bytes"] in (None, 4 * 33 * {demo.FIRST: 17, demo.SECOND: 13}[row["task"]])
    assert (tmp_path / "results.md").read_text() in output
    assert (tmp_path / "accuracy_against_bytes.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_if_a_comparison_fails(tiny_bert, few_sentences, tmp_path, capsys, monkeypatch):
    result = Result("mask", demo.FIRST, "token accuracy", 0.5, adapter_bytes=1000)
    monkeypatch.setattr(demo, "train", lambda *_: result)
    monkeypatch.setattr(demo, "probe_score", lambda *_: 0.5)
    monkeypatch.setattr(demo, "check_serving", lambda *_: [("this", True), ("that", False)])
    assert demo.main(["--model", tiny_bert, "--output", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "DIFFERENT  that" in output
    assert "FAILED" in output


@pytest.mark.parametrize(("method", "rate"), [("mask", 5e-4), ("LoRA r=8", 1e-3), ("full fine-tuning", 3e-4)])
def test_every_method_trains_the_head_at_the_same_rate_and_the_rest_at_its_own(tiny_bert, method, rate):
    base = BaseModel(tiny_bert, seed=0).load(Task("pos", "token accuracy", ["A", "B"], *[Dataset.from_list([])] * 2))
    assert base.config.hidden_dropout_prob == base.config.attention_probs_dropout_prob == 0
    model, optimizer, _ = METHODS[method](base)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(rates)
    assert {rate for name, rate in trained.items() if "classifier" in name} == {HEAD_LR}
    assert {rate for name, rate in trained.items() if "classifier" not in name} == {rate}
    head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name)
    assert head == 2 * 32 + 2  # no LoRA beside it, no mask on it


def test_probe_finds_tags_that_the_words_alone_decide(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sentences = [[(word, word.upper()) for word in words.split()] for words in ("a b c", "c c b a", "b a", "a a a b c")]
    rows = tasks.encode(sentences, tokenizer, ["A", "B", "C"])
    task = Task("letters", "token accuracy", ["A", "B", "C"], rows, rows)
    assert tasks.probe_score(task, BaseModel(tiny_bert, seed=0)) == 1


def test_every_word_is_labelled_once_on_its_last_piece(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = tasks.encode([[("cat", "B"), ("a", "A")], [("ox", "B")]], tokenizer, ["A", "B"])
    assert rows["labels"][:] == [[IGNORED, IGNORED, IGNORED, 1, 0, IGNORED], [IGNORED, IGNORED, 1, IGNORED]]
    long = [("oak", "A")] * 150
    assert sum(label != IGNORED for label in tasks.encode([long], tokenizer, ["A"])["labels"][0]) == 150


def test_a_word_without_a_piece_is_refused(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with pytest.raises(ValueError, match=r"no word piece in '\\ufe0f'; leave the word out"):
        tasks.encode([[("cat", "A"), ("\ufe0f", "A")]], tokenizer, ["A"])


def test_task_scores_only_the_labelled_pieces():
    empty = Dataset.from_list([])
    expected = np.array([[IGNORED, 0, IGNORED], [IGNORED, 1, 2]])
    predicted = np.array([[2, 0, 2], [2, 1, 0]])
    assert Task("pos", "token accuracy", ["X", "Y", "Z"], empty, empty).score(predicted, expected) == 2 / 3
    # gold: one span of one word, and one of two; found: the first and half of the second
    assert Task("ner", "span F1", ["B-x", "B-y", "I-y"], empty, empty).score(predicted, expected) == 0.4


def test_table_names_the_metric_and_is_relative_to_full_fine_tuning_of_the_same_task():
    results = [
        Result("full fine-tuning", "a", "token accuracy", 0.9, seconds=10.0),
        Result("mask", "a", "token accuracy", 0.9, adapter_bytes=1234, sparsity=0.025, seconds=9.0),
        Result("mask", "b", "span F1", 0.8, seconds=5.0),
    ]
    last = table(results).splitlines()
    assert "token accuracy" in last[3]
    assert "1,234" in last[3]
    assert "2.50%" in last[3]
    assert "0.90 x" in last[3]
    assert "span F1" in last[4]
    assert "x |" not in last[4]  # nothing to compare with
