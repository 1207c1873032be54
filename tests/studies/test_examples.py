"""The examples, run on a tiny random model: what they write, what they check, and what they say to wrong input."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.data import cut
from examples.demo import __main__ as demo
from examples.demo import methods, tasks
from examples.demo.methods import METHODS, Result
from examples.demo.report import table
from examples.demo.tasks import DATA, BaseModel, Task
from peft_mask import MaskConfig, Masks
from peft_mask.cli.main import main
from peft_mask.recipes import script, text_classification
from peft_mask.recipes.tagging import IGNORED, label_last_pieces, read_columns, span_f1, spans, token_accuracy
from peft_mask.training.optimizer import HEAD_LR
from tests.processes import launch

SPLITS = ("train", "test")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

ROWS = [{"text": f"{word} {i}", "label": label} for i in range(12) for word, label in (("cat", "pet"), ("oak", "tree"))]


def write_csv(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    return str(file)


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def run_script(model: str, output: Path, *arguments: str) -> dict[str, float]:
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2", "--use_cpu", "true"]
    return text_classification.main([*common, "--disable_tqdm", "true", *arguments])


@pytest.mark.parametrize(("write", "ending"), [(write_csv, "csv"), (write_jsonl, "jsonl")])
def test_script_learns_from_local_files(tiny_bert, tmp_path, capsys, write, ending):
    train, test = write(tmp_path / f"train.{ending}", ROWS), write(tmp_path / f"test.{ending}", ROWS[:6])
    out = tmp_path / "out"
    figures = run_script(tiny_bert, out, "--train_file", train, "--validation_file", test, "--test_file", test)

    assert 0 <= figures["accuracy"] <= 1
    file_size = (out / "adapter_model.safetensors").stat().st_size
    assert figures["mask_bytes"] + figures["head_bytes"] == file_size
    assert figures["head_bytes"] == 4 * (2 * 32 + 2)  # float32 weight and bias of the classifier
    assert MaskConfig.from_pretrained(out).label_names == ("pet", "tree")
    assert "test accuracy" in capsys.readouterr().out
    # what the printed files are for: the adapter loads, and its head has the labels' size
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    assert PeftModel.from_pretrained(base, out).get_base_model().classifier.original_module.out_features == 2
    assert len(Masks.load(out)) == 13  # six linear layers in each of two blocks, and the pooler


@pytest.mark.slow
def test_script_runs_on_several_processes_of_which_the_first_writes_and_prints(tiny_bert, tmp_path):
    train, test = write_csv(tmp_path / "train.csv", ROWS), write_csv(tmp_path / "test.csv", ROWS[:7])
    common = ["--model_name_or_path", tiny_bert, "--train_file", train, "--test_file", test]
    common += ["--per_device_train_batch_size", "4", "--max_steps", "3", "--use_cpu", "true", "--disable_tqdm", "true"]
    printed = launch("examples/text_classification.py", *common, "--output_dir", str(tmp_path / "out"))
    assert printed.count("\ntest accuracy ") == printed.count("bytes, head 264 bytes") == 1
    assert MaskConfig.from_pretrained(tmp_path / "out").label_names == ("pet", "tree")
    assert Masks.load(tmp_path / "out").sparsity > 0


def test_script_takes_pairs_and_holds_out_rows_if_there_is_no_test_file(tiny_bert, tmp_path, capsys):
    rows = [{"premise": row["text"], "hypothesis": "a cat", "label": row["label"]} for row in ROWS]
    run_script(tiny_bert, tmp_path / "out", "--train_file", write_csv(tmp_path / "train.csv", rows))
    assert "a tenth of the training rows is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give either --dataset_name .* or --train_file"),
        (["--dataset_name", "a/b", "--train_file", "x.csv"], r"give either --dataset_name .* or --train_file"),
        (
            ["--dataset_name", "a/b", "--test_file", "x.csv"],
            r"--test_file go with --train_file, not with --dataset_name",
        ),
        (["--train_file", "gone.csv"], r"--train_file gone.csv: there is no such file"),
        (["--train_file", "table.xlsx"], r"--train_file table.xlsx: expected a file that ends in one of .csv"),
        (
            ["--train_file", "TRAIN", "--text_column", "body"],
            r"there is no column \['body'\]; .*\['text', 'label'\]",
        ),
        (["--train_file", "TRAIN", "--label_column", "klass"], r"there is no column \['klass'\]"),
        (
            ["--train_file", "TRAIN", "--text_column", "text", "label", "text"],
            r"name one text column, or two for pairs",
        ),
        (["--train_file", "NO_LABEL"], r"name the column with --label_column"),
        (["--train_file", "NO_TEXT"], r"name one text column, or two for pairs, with --text_column"),
        (["--train_file", "TRAIN", "--test_file", "NEW_LABEL"], r"label 'fish' does not occur in the training data"),
        (["--train_file", "TRAIN", "--validation_file", "NO_LABEL"], r"there is no column \['label'\]"),
        (["--train_file", "TRAIN", "--target_bytes", "10"], r"target_bytes=10 is out of reach: .* take from \d+ bytes"),
        (
            ["--train_file", "NUMBERS"],
            r"column 'label' holds numbers such as 0.5, as for regression, which is not suppor",
        ),
        (["--train_file", "ONE_CLASS"], r"ONE_CLASS.csv: column 'label' holds 'pet' alone; .* two classes or more"),
        (["--train_file", "THREE_ROWS"], r"THREE_ROWS.csv: 3 rows are too few to hold a tenth out .* or a --test_file"),
        (
            ["--train_file", "EMPTY_CELL"],
            r"EMPTY_CELL.csv: row 25: column 'text' is empty; fill it in or leave the row o",
        ),
        (
            ["--train_file", "TRAIN", "--test_file", "EMPTY_CELL"],
            r"--test_file .*EMPTY_CELL.csv: row 25: column 'text'",
        ),
        (["--train_file", "TRAIN", "--test_file", "NO_LABEL"], r"--test_file .*: there is no column \['label'\]"),
        (["--train_file", "LABEL_LISTS"], r"column 'label' holds lists; expected one label a row"),
    ],
)
def test_script_says_what_is_wrong_with_the_input(tiny_bert, tmp_path, arguments, message):
    files = {
        "TRAIN": ROWS,
        "NO_LABEL": [{"text": "cat", "other": "pet"}],
        "NO_TEXT": [{"words": "cat", "label": "pet"}],
        "NEW_LABEL": [{"text": "cod", "label": "fish"}],
        "NUMBERS": [{"text": "cat", "label": "0.5"}],
        "ONE_CLASS": [row for row in ROWS if row["label"] == "pet"],
        "THREE_ROWS": ROWS[:3],
        "EMPTY_CELL": [*ROWS, {"text": "", "label": "pet"}],
    }
    paths = {name: write_csv(tmp_path / f"{name}.csv", rows) for name, rows in files.items()}
    paths["LABEL_LISTS"] = write_jsonl(tmp_path / "lists.jsonl", [{"text": "cat", "label": ["pet"]}])
    with pytest.raises(SystemExit, match=message):
        run_script(tiny_bert, tmp_path / "out", *(paths.get(argument, argument) for argument in arguments))


def test_hidden_test_labels_are_not_scored():
    hidden = Dataset.from_dict({"text": ["cat"], "label": [-1]})
    known = Dataset.from_dict({"text": ["cat"], "label": [0]})
    splits = {"train": known, "validation": known, "test": hidden}
    assert script.choose_test_split(splits, "label", seed=0) == "validation"


def test_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"error: --model_name_or_path \./gone: "):
        run_script("./gone", tmp_path / "out", "--train_file", write_csv(tmp_path / "train.csv", ROWS))


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


def test_last_pieces_carry_the_tags():
    assert label_last_pieces([None, 0, 0, 1, None], [7, 8]) == [IGNORED, IGNORED, 7, 8, IGNORED]
    assert label_last_pieces([None, 0, 0], [7, 8]) == [IGNORED, IGNORED, 7]  # the second word was cut off


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", set()),
        ("O O", set()),
        ("B-a", {(0, 1, "a")}),
        ("B-a I-a O B-b", {(0, 2, "a"), (3, 4, "b")}),
        ("B-a B-a I-a", {(0, 1, "a"), (1, 3, "a")}),  # neighbors of the same type
        ("B-a I-b I-b", {(0, 1, "a"), (1, 3, "b")}),  # another type ends a span and starts one
        ("O I-a I-a O", {(1, 3, "a")}),  # no B-: starts one all the same
        ("I-a B-a", {(0, 1, "a"), (1, 2, "a")}),
        ("B-creative-work I-creative-work", {(0, 2, "creative-work")}),
    ],
)
def test_spans_are_those_of_conlleval(tags, found):
    assert spans(tags.split()) == found


def test_span_f1_wants_type_and_boundaries():
    gold = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]]
    assert span_f1(gold, gold) == 1
    assert span_f1(gold, [["I-a", "I-a", "O"], ["I-b", "O", "I-a"]]) == 1  # the same spans
    assert span_f1(gold, [["B-b", "I-b", "O"], ["O", "O", "O"]]) == 0  # type
    assert span_f1(gold, [["B-a", "O", "O"], ["O", "O", "O"]]) == 0  # boundary
    # micro: 1 right of 3 in the data and 2 found, wherever they stand
    assert span_f1(gold, [["B-a", "I-a", "O"], ["O", "B-a", "O"]]) == pytest.approx(2 * 1 / (3 + 2))
    assert span_f1([["O"]], [["O"]]) == 0


def test_token_accuracy_counts_words_not_sentences():
    assert token_accuracy([["A"], ["A", "B", "B"]], [["A"], ["B", "B", "A"]]) == 0.5


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


def test_cut_reads_the_syntactic_words_of_conllu(tmp_path):
    lines = [
        "# text = don't go",
        "1-2\tdon't\t_\t_",
        "1\tdo\tdo\tAUX",
        "2\tn't\tnot\tPART",
        "2.1\tx\tx\tVERB",
        "3\tgo\tgo\tVERB",
    ]
    (tmp_path / "a.conllu").write_text("\n".join([*lines, "", "# text = no", "1\tno\tno\tINTJ", "", ""]))
    expected = [[("do", "AUX"), ("n't", "PART"), ("go", "VERB")], [("no", "INTJ")]]
    assert cut.read_conllu(tmp_path / "a.conllu") == expected


def test_cut_chooses_from_the_set_of_sentences():
    short, long = [("a", "A")], [("b", "B")] * (cut.SENTENCE_WORDS + 1)
    invisible, known, other = [("\ufe0f", "A")], [("a", "B")], [("c", "C")]
    expected = {"train": [short], "test": [other]}
    assert cut.cut_sentences([short, short, long], [other, known, invisible, long, other], (1, 1)) == expected
    many = [[(letter, "A")] for letter in LETTERS]
    assert cut.cut_sentences(many, many[:0], (9, 0)) == cut.cut_sentences(many[::-1], many[:0], (9, 0))


@pytest.mark.parametrize(("name", "tags"), [(demo.FIRST, 17), (demo.SECOND, 13)])
def test_committed_sentences_have_every_tag_in_both_splits_and_share_none(name, tags):
    splits = {split: read_columns(DATA / name / f"{split}.conll") for split in SPLITS}
    for sentences in splits.values():
        assert len({tag for sentence in sentences for _, tag in sentence}) == tags
        assert all(word.strip() == word and word for sentence in sentences for word, _ in sentence)
    train, test = ({tuple(word for word, _ in sentence) for sentence in splits[split]} for split in SPLITS)
    assert not train & test


@pytest.mark.parametrize(("name", "labels"), [("banking77", 77), ("clinc150", 150)])
def test_committed_texts_have_every_label_in_both_splits(name, labels):
    files = {split: str(DATA / name / f"{split}.csv") for split in SPLITS}
    rows = load_dataset("csv", data_files=files)
    assert len(set(rows["train"]["label"])) == labels
    assert set(rows["train"]["label"]) == set(rows["test"]["label"])
    assert rows["train"].column_names == ["text", "label"]


def test_committed_data_stay_small_and_say_where_they_come_from():
    files = [file for file in DATA.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    text = (DATA / "README.md").read_text()
    for name in (demo.FIRST, demo.SECOND, "banking77", "clinc150", "CC BY 3.0", "CC BY 4.0", "CC BY-SA 4.0"):
        assert name in text
