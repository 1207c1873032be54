"""Learn a mask for classifying texts or pairs of texts: any data set of the Hub or local files, any encoder.

    python -m examples.text_classification --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name PolyAI/banking77 --output_dir out

    python -m examples.text_classification --model_name_or_path bert-base-uncased --task_name mrpc --output_dir out

    python -m examples.text_classification --model_name_or_path roberta-base \
        --train_file train.csv --validation_file dev.csv --test_file test.csv --text_column premise hypothesis \
        --output_dir out --push_to_hub --hub_model_id me/roberta-base-my-task-mask

Every argument of `transformers.TrainingArguments` works (`--num_train_epochs`, `--max_steps`, `--seed`, `--bf16`, ...);
`--help` lists them. `--learning_rate` is that of the task head; for the mask any does the same. `--target_bytes 50000`
asks for a mask of 50 kB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef  # type: ignore[import-untyped]
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from peft_mask.recipes.rows import (
    check_columns,
    check_texts,
    choose_column,
    label_names,
    label_numbers,
    source_of,
    type_of,
)
from peft_mask.recipes.script import (
    LABEL_COLUMNS,
    ScriptArguments,
    Task,
    choose_test_split,
    logits_of,
    run,
    used_splits,
)

GLUE = "nyu-mll/glue"
# the names that the data sets of GLUE and many others use
TEXT_COLUMNS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("sentence",),
    ("content",),
)


@dataclass
class TextArguments(ScriptArguments):
    """The arguments of this script."""

    task_name: str | None = field(
        default=None, metadata={"help": "Task of GLUE, such as mrpc, in place of a data set."}
    )
    text_column: list[str] | None = field(default=None, metadata={"help": "One column, or two for pairs."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.dataset_name is None:
            self.dataset_name, self.dataset_config_name = GLUE, self.task_name


def text_columns(rows: Dataset, given: Sequence[str] | None = None) -> list[str]:
    """Return the text columns: those that are given, else those with a usual name.

    Raises:
        ValueError: if a given column does not exist, there are more than two, or none has a usual name.
    """
    check_columns(rows, given or ())
    found = given or next((names for names in TEXT_COLUMNS if set(names) <= set(rows.column_names)), ())
    if not 1 <= len(found) <= 2:
        raise ValueError(
            f"{source_of(rows)}: name one text column, or two for pairs, with --text_column; the data have "
            f"{rows.column_names} (of a table, its first line)."
        )
    return list(found)


def encode(
    split: Dataset, tokenizer: Any, columns: Sequence[str], label_column: str, names: Sequence[str], max_length: int
) -> Dataset:
    """Turn texts into token ids and labels into numbers.

    Raises:
        ValueError: if a row lacks a text or its label, or a label does not occur in the training data.
    """
    check_texts(split, columns)
    labels = label_numbers(split, label_column, names)

    def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    return split.map(encode_batch, batched=True, remove_columns=split.column_names).add_column("labels", labels)


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy, Matthews' correlation (the metric of CoLA) and, of two classes, the F1 of the second."""
    logits, labels = logits_of(prediction), prediction.label_ids
    predicted = np.asarray(logits).argmax(-1)
    figures = {
        "accuracy": float((predicted == labels).mean()),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
    if logits.shape[-1] == 2:
        figures["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
    return figures


def prepare(splits: dict[str, Dataset], tokenizer: Any, arguments: TextArguments, seed: int) -> Task:
    """Make the task of the splits.

    Raises:
        ValueError: if a column is missing, or a label does not occur in the training data.
    """
    train = splits["train"]
    columns = text_columns(train, arguments.text_column)
    label_column = choose_column(train, arguments.label_column, LABEL_COLUMNS, "label_column")
    check_texts(train, columns)
    if type_of(train, label_column) == "lists":
        raise ValueError(f"{source_of(train)}: column {label_column!r} holds lists; expected one label a row.")
    names = label_names(train, label_column)
    test = choose_test_split(splits, label_column, seed)
    data = {
        name: encode(splits[name], tokenizer, columns, label_column, names, arguments.max_seq_length)
        for name in used_splits(splits, test)
    }
    collator = DataCollatorWithPadding(tokenizer)
    return Task(
        AutoModelForSequenceClassification, "SEQ_CLS", data, test, collator, metrics, names, "text-classification"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed."""
    return run(TextArguments, __doc__, prepare, argv)
