"""The examples, run on a tiny random model: what they write, what they check, and what they say to wrong input."""

import json
from functools import partial
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

from examples import text_classification
from examples.demo import __main__ as demo
from examples.demo import methods, tasks
from examples.demo.methods import Result
from examples.demo.report import table
from examples.demo.tasks import DATA
from peft_mask import MaskConfig, Masks

SPLITS = ("train", "test")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers of width 32 that spells its words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=60,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


ROWS = [{"text": f"{word} {i}", "label": label} for i in range(12) for word, label in (("cat", "pet"), ("oak", "tree"))]


def write_csv(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    return str(file)


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> str:
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
    assert json.loads((out / "labels.json").read_text()) == ["pet", "tree"]
    assert "test accuracy" in capsys.readouterr().out
    # what the printed files are for: the adapter loads, and its head has the labels' size
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    assert PeftModel.from_pretrained(base, out).get_base_model().classifier.original_module.out_features == 2
    assert len(Masks.load(out)) == 13  # six linear layers in each of two blocks, and the pooler


def test_script_takes_pairs_and_holds_out_rows_if_there_is_no_test_file(tiny_bert, tmp_path, capsys):
    rows = [{"premise": row["text"], "hypothesis": "a cat", "label": row["label"]} for row in ROWS]
    run_script(tiny_bert, tmp_path / "out", "--train_file", write_csv(tmp_path / "train.csv", rows))
    assert "a tenth of the training rows is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give either --dataset_name .* or --train_file"),
        (["--dataset_name", "a/b", "--train_file", "x.csv"], r"give either --dataset_name .* or --train_file"),
        (["--train_file", "gone.csv"], r"--train_file gone.csv: there is no such file"),
        (["--train_file", "table.xlsx"], r"--train_file table.xlsx: expected a file that ends in one of .csv"),
        (["--train_file", "TRAIN", "--text_columns", "body"], r"there is no column \['body'\]; .*\['text', 'label'\]"),
        (["--train_file", "TRAIN", "--label_column", "klass"], r"there is no column \['klass'\]"),
        (
            ["--train_file", "TRAIN", "--text_columns", "text", "label", "text"],
            r"name one text column, or two for pairs",
        ),
        (["--train_file", "NO_LABEL"], r"name the column of the labels with --label_column"),
        (["--train_file", "NO_TEXT"], r"name one text column, or two for pairs, with --text_columns"),
        (["--train_file", "TRAIN", "--test_file", "NEW_LABEL"], r"label 'fish' does not occur in the training data"),
        (["--train_file", "TRAIN", "--validation_file", "NO_LABEL"], r"there is no column \['label'\]"),
        (["--train_file", "NUMBERS"], r"'label' holds float64 numbers; classification needs classes"),
    ],
)
def test_script_says_what_is_wrong_with_the_input(tiny_bert, tmp_path, arguments, message):
    files = {
        "TRAIN": ROWS,
        "NO_LABEL": [{"text": "cat", "other": "pet"}],
        "NO_TEXT": [{"words": "cat", "label": "pet"}],
        "NEW_LABEL": [{"text": "cod", "label": "fish"}],
        "NUMBERS": [{"text": "cat", "label": "0.5"}],
    }
    paths = {name: write_csv(tmp_path / f"{name}.csv", rows) for name, rows in files.items()}
    with pytest.raises(SystemExit, match=message):
        run_script(tiny_bert, tmp_path / "out", *(paths.get(argument, argument) for argument in arguments))


def test_class_labels_keep_their_own_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["tree", "pet"])})
    train = Dataset.from_dict({"text": ["oak", "cat"], "label": [0, 1]}, features=features)
    assert text_classification.label_names(train, "label") == ["tree", "pet"]


def test_hidden_test_labels_are_not_scored():
    hidden = Dataset.from_dict({"text": ["cat"], "label": [-1]})
    known = Dataset.from_dict({"text": ["cat"], "label": [0]})
    splits = {"train": known, "validation": known, "test": hidden}
    assert text_classification.choose_test_split(splits, "label", seed=0) == "validation"


@pytest.fixture
def few_rows(tmp_path_factory, monkeypatch):
    """The demo's data, of each task the texts of three labels and of four."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in ((demo.FIRST, 3), (demo.SECOND, 4)):
        (folder / name).mkdir()
        rows = {split: load_dataset("csv", data_files=str(DATA / name / f"{split}.csv"))["train"] for split in SPLITS}
        labels = sorted(set(rows["test"]["label"]))[:count]
        for split in SPLITS:
            chosen = [row for row in rows[split] if row["label"] in labels]
            Dataset.from_list(chosen).to_csv(folder / name / f"{split}.csv")
    monkeypatch.setattr(tasks, "DATA", folder)


def test_demo_trains_reports_and_serves(tiny_bert, few_rows, tmp_path, capsys, monkeypatch):
    # Two steps switch nothing off. With masks that start at random the comparisons are of something.
    monkeypatch.setattr(methods, "MaskConfig", partial(MaskConfig, init_weights=False, init_sparsity=0.1))
    assert demo.main(["--model", tiny_bert, "--steps", "2", "--threads", "1", "--output", str(tmp_path)]) == 0

    output = capsys.readouterr().out
    assert output.count("  equal  ") == 7
    assert "DIFFERENT" not in output
    assert "(0 weights written over)" not in output
    rows = json.loads((tmp_path / "results.json").read_text())
    names = [row["method"] for row in rows if row["task"] == demo.FIRST]
    assert names == [demo.PROBE, "full fine-tuning", "LoRA r=8", "mask"]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert (row["sparsity"] is not None) == (row["method"] == "mask")
    assert (tmp_path / "results.md").read_text() in output
    assert (tmp_path / "accuracy_against_bytes.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_if_a_comparison_fails(tiny_bert, few_rows, tmp_path, capsys, monkeypatch):
    result = Result("mask", demo.FIRST, 0.5, adapter_bytes=1000)
    monkeypatch.setattr(demo, "train", lambda *_: result)
    monkeypatch.setattr(demo, "probe_accuracy", lambda *_: 0.5)
    monkeypatch.setattr(demo, "check_serving", lambda *_: [("this", True), ("that", False)])
    assert demo.main(["--model", tiny_bert, "--output", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "DIFFERENT  that" in output
    assert "FAILED" in output


def test_table_is_relative_to_full_fine_tuning_of_the_same_task():
    results = [
        Result("full fine-tuning", "a", 0.9, seconds=10.0),
        Result("mask", "a", 0.9, adapter_bytes=1234, sparsity=0.025, seconds=9.0),
        Result("mask", "b", 0.8, seconds=5.0),
    ]
    last = table(results).splitlines()
    assert "1,234" in last[3]
    assert "2.50%" in last[3]
    assert "0.90 x" in last[3]
    assert "x |" not in last[4]  # nothing to compare with


@pytest.mark.parametrize("name", [demo.FIRST, demo.SECOND])
def test_committed_data_has_every_label_in_both_splits(name):
    rows = {split: load_dataset("csv", data_files=str(DATA / name / f"{split}.csv"))["train"] for split in SPLITS}
    assert set(rows["train"]["label"]) == set(rows["test"]["label"])
    assert rows["train"].column_names == ["text", "label"]


def test_committed_data_stay_small_and_say_where_they_come_from():
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 1_000_000
    text = (DATA / "README.md").read_text()
    for name in (demo.FIRST, demo.SECOND):
        assert name in text
    assert "CC BY 4.0" in text
    assert "CC BY 3.0" in text
