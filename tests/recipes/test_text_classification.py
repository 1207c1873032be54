"""Classification of texts, on a tiny random model: what it writes, what it scores, and what it says to wrong input."""

import numpy as np
import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, EvalPrediction

from peft_mask import MaskConfig, Masks
from peft_mask.recipes import script, text_classification
from tests.processes import launch
from tests.text_rows import ROWS, run_script, write_csv, write_jsonl


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


def test_two_classes_have_an_f1_and_all_have_a_correlation():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    figures = text_classification.metrics(EvalPrediction(logits, np.array([0, 0, 1, 1])))
    assert figures == pytest.approx({"accuracy": 0.75, "matthews_correlation": 3**-0.5, "f1": 0.8})
    assert "f1" not in text_classification.metrics(EvalPrediction(np.eye(3), np.arange(3)))


def test_a_task_of_glue_is_asked_for_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "load_dataset", lambda *names, revision: asked.append(names) or {})
    script.load_splits(text_classification.TextArguments("model", task_name="mrpc"))
    assert asked == [("nyu-mll/glue", "mrpc")]
