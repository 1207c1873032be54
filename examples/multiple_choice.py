"""Learn a mask for multiple choice, such as SWAG, with any encoder.

    python -m examples.multiple_choice --model_name_or_path bert-base-uncased \
        --dataset_name allenai/swag --dataset_config_name regular --output_dir out

    python -m examples.multiple_choice --model_name_or_path bert-base-uncased --train_file train.jsonl \
        --validation_file dev.jsonl --output_dir out

A local file has the columns of SWAG (`sent1`, `sent2`, `ending0`, `ending1`, ... and `label`) or `context`, `choices`
(a list) and `label`, the number of the right one. Every argument of `transformers.TrainingArguments` works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, EvalPrediction

from peft_mask.recipes import launched
from peft_mask.recipes.rows import check_filled, source_of
from peft_mask.recipes.script import ScriptArguments, Task, choose_test_split, logits_of, run, used_splits


def pairs(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the texts of one row, one pair a choice: what all have in common, and what each adds."""
    if "choices" in row:
        second = list(row["choices"])
        return [row["context"]] * len(second), second
    endings = sorted((name for name in row if name.startswith("ending")), key=lambda name: (len(name), name))
    second = [f"{row['sent2']} {row[name]}" for name in endings]
    return [row["sent1"]] * len(second), second


def check_choices(rows: Dataset) -> None:
    """Check that every row has texts to choose from, as many as the others, and the number of the right one.

    Raises:
        ValueError: if a column is missing, or a row is not so.
    """
    given, usual = rows.column_names, ["context", "choices", "label"]
    if "choices" not in given:
        usual = ["sent1", "sent2", "ending0", "label"]
    check_filled(rows, [*usual, *(name for name in given if name.startswith("ending") and name not in usual)])
    expected = None
    for number, row in enumerate(rows, 1):
        where = f"{source_of(rows)}: row {number}:"
        choices = pairs(row)[1] if "choices" not in row or isinstance(row["choices"], list) else []
        expected = expected or len(choices)
        if len(choices) < 2 or len(choices) != expected:
            raise ValueError(
                f"{where} expected two choices or more, as many as in row 1 ({expected}), found {len(choices)}."
            )
        texts = [row["context"], *choices] if "choices" in row else [row["sent1"], *choices]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where} expected texts, found {texts!r:.80}.")
        if str(row["label"]) not in map(str, range(len(choices))):
            raise ValueError(
                f"{where} column 'label': expected the number of the right choice, from 0 to {len(choices) - 1}, got "
                f"{row['label']!r}."
            )


def encode(split: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Turn each row into a list of token ids a choice.

    Raises:
        ValueError: if a column is missing, or a label is the number of no choice.
    """
    check_choices(split)

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        context, choices = pairs(row)
        return {**tokenizer(context, choices, truncation=True, max_length=max_length), "labels": int(row["label"])}

    return split.map(encode_row, remove_columns=split.column_names)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows whose right choice has the largest logit."""
    return {"accuracy": float((np.asarray(logits_of(prediction)).argmax(-1) == prediction.label_ids).mean())}


def prepare(splits: dict[str, Dataset], tokenizer: Any, arguments: ScriptArguments, seed: int) -> Task:
    """Make the task of the splits.

    Raises:
        ValueError: if a row lacks choices or the number of the right one.
    """
    check_choices(splits["train"])
    test = choose_test_split(splits, "label", seed)
    data = {name: encode(splits[name], tokenizer, arguments.max_seq_length) for name in used_splits(splits, test)}
    return Task(
        AutoModelForMultipleChoice,
        None,  # PEFT has no name for it
        data,
        test,
        DataCollatorForMultipleChoice(tokenizer),
        accuracy,
        None,
        "multiple-choice",
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed."""
    return run(ScriptArguments, __doc__, prepare, argv)


if __name__ == "__main__":
    launched.run(main)
