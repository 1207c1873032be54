"""Learn a mask for a text classification task: any data set of the Hub or local CSV/JSONL files, any encoder.

    python examples/text_classification.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name PolyAI/banking77 --output_dir out

    python examples/text_classification.py --model_name_or_path roberta-base \
        --train_file train.csv --validation_file dev.csv --test_file test.csv --text_columns premise hypothesis \
        --output_dir out --push_to_hub --hub_model_id me/roberta-base-my-task-mask

Every argument of `transformers.TrainingArguments` works (`--num_train_epochs`, `--max_steps`, `--seed`, `--bf16`, ...);
`--help` lists them. `--learning_rate` is that of the task head; for the mask any does the same. `--target_bytes 50000`
asks for a mask of 50 kB.
"""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from peft import get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_mask import MaskCallback, MaskConfig, create_mask_optimizer
from peft_mask.training import HEAD_LR

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json"}
LABEL_COLUMNS = ("label", "labels", "intent", "category")
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
class ScriptArguments:
    """What `TrainingArguments` does not say."""

    model_name_or_path: str = field(metadata={"help": "Encoder on the Hub, or a folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, such as mrpc of GLUE."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or JSONL file, instead of a data set."})
    validation_file: str | None = field(default=None, metadata={"help": "File for evaluation during training."})
    test_file: str | None = field(default=None, metadata={"help": "File for the evaluation at the end."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One column, or two for pairs."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights to switch off."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the mask's file, in its place."})


def load_splits(arguments: ScriptArguments) -> dict[str, Dataset]:
    """Load the splits of a data set of the Hub or of local files, by name.

    Raises:
        ValueError: if neither a data set nor a train file is given, or both, or a file has an unknown type.
        FileNotFoundError: if a file does not exist.
    """
    if (arguments.dataset_name is None) == (arguments.train_file is None):
        raise ValueError("give either --dataset_name (a data set of the Hub) or --train_file (a local file).")
    if arguments.dataset_name is not None:
        return dict(load_dataset(arguments.dataset_name, arguments.dataset_config))
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    splits = {}
    for split, name in files.items():
        if name is None:
            continue
        path = Path(name)
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"--{split}_file {name}: expected a file that ends in one of {', '.join(FILE_TYPES)}.")
        if not path.is_file():
            raise FileNotFoundError(f"--{split}_file {name}: there is no such file (working directory {Path.cwd()}).")
        splits[split] = load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
    return splits


def choose_columns(
    available: Sequence[str], text_columns: Sequence[str] | None = None, label_column: str | None = None
) -> tuple[list[str], str]:
    """Return the text columns and the label column: those that are given, else those with a usual name.

    Raises:
        ValueError: if a given column does not exist, or none has a usual name.
    """
    check_columns(available, [name for name in (*(text_columns or ()), label_column) if name])
    if text_columns is None:
        text_columns = next((names for names in TEXT_COLUMNS if set(names) <= set(available)), None)
    if text_columns is None or not 1 <= len(text_columns) <= 2:
        raise ValueError(
            f"name one text column, or two for pairs, with --text_columns; the data have {list(available)}."
        )
    label_column = label_column or next((name for name in LABEL_COLUMNS if name in available), None)
    if label_column is None:
        raise ValueError(f"name the column of the labels with --label_column; the data have {list(available)}.")
    return list(text_columns), label_column


def check_columns(available: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ValueError if a wanted column is not among the available ones."""
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError(f"there is no column {unknown}; the data have {list(available)}.")


def label_names(train: Dataset, column: str) -> list[str]:
    """Return the names of the labels in the order of their numbers.

    Raises:
        ValueError: if the column holds numbers that are not whole: that is regression.
    """
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature.dtype.startswith("float"):
        raise ValueError(f"column {column!r} holds {feature.dtype} numbers; classification needs classes.")
    return [str(value) for value in sorted(train.unique(column))]


def encode(
    split: Dataset,
    tokenizer: Any,
    text_columns: Sequence[str],
    label_column: str,
    names: Sequence[str],
    max_length: int,
) -> Dataset:
    """Turn texts into token ids and labels into numbers.

    Raises:
        ValueError: if a column is missing, or a label does not occur in the training data.
    """
    check_columns(split.column_names, [*text_columns, label_column])
    numbers = {name: number for number, name in enumerate(names)}
    is_class = isinstance(split.features[label_column], ClassLabel)

    def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        labels = batch[label_column] if is_class else [numbers.get(str(value), -1) for value in batch[label_column]]
        if min(labels) < 0:
            value = batch[label_column][labels.index(min(labels))]
            raise ValueError(f"column {label_column!r}: label {value!r} does not occur in the training data.")
        tokens = tokenizer(*(batch[column] for column in text_columns), truncation=True, max_length=max_length)
        return {**tokens, "labels": labels}

    return split.map(encode_batch, batched=True, remove_columns=split.column_names)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of texts whose largest logit is that of their label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.asarray(logits).argmax(-1) == prediction.label_ids).mean())}


def file_bytes(file: Path, head: Collection[str]) -> tuple[int, int]:
    """Return the size of a safetensors file as (bytes without the head, bytes of the head's tensors).

    Args:
        file: what `save_pretrained` wrote.
        head: names of the head's modules, such as `["classifier"]`.
    """
    with safe_open(file, framework="pt") as tensors:
        head_keys = [key for key in tensors.keys() if not set(head).isdisjoint(key.split("."))]  # noqa: SIM118 no mapping
        head_bytes = sum(tensors.get_tensor(key).nbytes for key in head_keys)
    return file.stat().st_size - head_bytes, head_bytes


def choose_test_split(splits: dict[str, Dataset], label_column: str, seed: int) -> str:
    """Return the name of the split to score at the end; if none has labels, hold out a tenth of the training rows."""
    for name in ("test", "validation", "validation_matched"):
        if name in splits and label_column in splits[name].features and min(splits[name][label_column]) != -1:
            return name  # GLUE publishes its test labels as -1
    splits.update(splits["train"].train_test_split(test_size=0.1, seed=seed))
    print("no labelled test or validation split: a tenth of the training rows is held out for the test.")
    return "test"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed."""
    parser = HfArgumentParser(
        (ScriptArguments, TrainingArguments), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(learning_rate=HEAD_LR, per_device_train_batch_size=32, per_device_eval_batch_size=64)
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    arguments, training_arguments = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training_arguments.seed)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    try:
        splits = load_splits(arguments)
        columns, label_column = choose_columns(
            splits["train"].column_names, arguments.text_columns, arguments.label_column
        )
        names = label_names(splits["train"], label_column)
        test = choose_test_split(splits, label_column, training_arguments.seed)
        data = {
            name: encode(splits[name], tokenizer, columns, label_column, names, arguments.max_length)
            for name in {"train", "validation", test} & set(splits)
        }
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    budget = {"target_sparsity": arguments.target_sparsity, "target_bytes": arguments.target_bytes}
    try:
        model = get_peft_model(base, MaskConfig(task_type="SEQ_CLS", **budget))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    optimizer = create_mask_optimizer(model, lr=training_arguments.learning_rate)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),  # None: the schedule of the arguments
        callbacks=[MaskCallback()],
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    scored = trainer.evaluate(data[test], metric_key_prefix="test")

    output = Path(training_arguments.output_dir)
    trainer.save_model()
    (output / "labels.json").write_text(json.dumps(names), encoding="utf-8")  # an adapter does not name its labels
    mask, head = file_bytes(output / "adapter_model.safetensors", model.peft_config["default"].modules_to_save)
    print(f"{test} accuracy {scored['test_accuracy']:.4f} on {len(data[test])} texts")
    print(f"{output}: mask {mask:,} bytes, head {head:,} bytes")
    if training_arguments.push_to_hub:
        trainer.push_to_hub(tasks="text-classification", dataset=arguments.dataset_name)
    return {"accuracy": scored["test_accuracy"], "mask_bytes": mask, "head_bytes": head}


if __name__ == "__main__":
    main()
