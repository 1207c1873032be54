"""What the scripts share: their arguments, data of the Hub or of files, the training, and what is saved and printed."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import ClassLabel, Dataset, load_dataset
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.tagging import read_columns
from peft_mask import HEAD_LR, MaskCallback, MaskConfig, create_mask_optimizer

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".conll": "columns"}
LABEL_COLUMNS = ("label", "labels", "intent", "category")


@dataclass
class ScriptArguments:
    """What `TrainingArguments` does not say; the names are those of transformers' own examples."""

    model_name_or_path: str = field(metadata={"help": "Encoder on the Hub, or a folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its revision."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON, JSONL or CoNLL file, in its place."})
    validation_file: str | None = field(default=None, metadata={"help": "File for evaluation during training."})
    test_file: str | None = field(default=None, metadata={"help": "File for the evaluation at the end."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights to switch off."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the mask's file, in its place."})


Arguments = TypeVar("Arguments", bound=ScriptArguments)


@dataclass(frozen=True)
class Task:
    """A task, ready for a model.

    Attributes:
        model_class: the auto class that makes a model with a head for it.
        task_type: PEFT's name for it, or None if it has none.
        data: encoded "train", the split to score at the end, and "validation", if there is one.
        test: the name of the split to score at the end.
        collator: makes a batch of rows.
        metrics: what `Trainer` calls `compute_metrics`; None if its logits are not enough to say.
        labels: names of the classes in the order of the logits, if there are classes.
        hub_tag: the Hub's name for the task.
    """

    model_class: Any
    task_type: str | None
    data: dict[str, Dataset]
    test: str
    collator: Any
    metrics: Callable[[EvalPrediction], dict[str, float]] | None
    labels: list[str] | None
    hub_tag: str

    def load(self, name: str, **config: Any) -> PreTrainedModel:
        """Load a pretrained model with a new head for the task; `config` are fields of its configuration."""
        if self.labels is not None:
            numbers = {label: number for number, label in enumerate(self.labels)}
            config |= {"num_labels": len(self.labels), "id2label": dict(enumerate(self.labels)), "label2id": numbers}
        return self.model_class.from_pretrained(name, **config)


def parse(kind: type[Arguments], description: str, argv: Sequence[str] | None) -> tuple[Arguments, TrainingArguments]:
    """Read the command line."""
    parser = HfArgumentParser(
        (kind, TrainingArguments), description=description, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(learning_rate=HEAD_LR, per_device_train_batch_size=32, per_device_eval_batch_size=64)
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    return parser.parse_args_into_dataclasses(args=argv)


def load_file(option: str, name: str, types: Mapping[str, str] = FILE_TYPES) -> Dataset:
    """Load a file of rows; one in CoNLL columns has `tokens` and, from its last column, `tags`.

    Args:
        option: of the command line, which an error names.
        name: the file.
        types: endings of files, and what `datasets` calls their type.

    Raises:
        ValueError: if the type of the file is unknown.
        FileNotFoundError: if it does not exist.
    """
    path = Path(name)
    if path.suffix not in types:
        raise ValueError(f"--{option} {name}: expected a file that ends in one of {', '.join(types)}.")
    if not path.is_file():
        raise FileNotFoundError(f"--{option} {name}: there is no such file (working directory {Path.cwd()}).")
    if types[path.suffix] == "columns":
        pairs = [tuple(zip(*sentence, strict=True)) for sentence in read_columns(path)]
        return Dataset.from_list([{"tokens": list(words), "tags": list(tags)} for words, tags in pairs])
    return load_dataset(types[path.suffix], data_files=str(path), split="train")


def load_splits(arguments: ScriptArguments) -> dict[str, Dataset]:
    """Load the splits of a data set of the Hub or of local files, by name.

    Raises:
        ValueError: if neither a data set nor a train file is given, or both, or a file has an unknown type.
        FileNotFoundError: if a file does not exist.
    """
    if (arguments.dataset_name is None) == (arguments.train_file is None):
        raise ValueError("give either --dataset_name (a data set of the Hub) or --train_file (a local file).")
    if arguments.dataset_name is not None:
        return dict(
            load_dataset(arguments.dataset_name, arguments.dataset_config_name, revision=arguments.dataset_revision)
        )
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    return {split: load_file(f"{split}_file", name) for split, name in files.items() if name is not None}


def check_columns(available: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ValueError if a wanted column is not among the available ones."""
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError(f"there is no column {unknown}; the data have {list(available)}.")


def choose_column(available: Sequence[str], given: str | None, usual: Sequence[str], option: str) -> str:
    """Return a given column, else the first with a usual name.

    Raises:
        ValueError: if the given column does not exist, or none has a usual name.
    """
    if given is not None:
        check_columns(available, [given])
        return given
    found = next((name for name in usual if name in available), None)
    if found is None:
        raise ValueError(f"name the column with --{option}; the data have {list(available)}.")
    return found


def choose_test_split(splits: dict[str, Dataset], label_column: str, seed: int) -> str:
    """Return the name of the split to score at the end; if none has labels, hold out a tenth of the training rows."""
    for name in ("test", "validation", "validation_matched"):
        if name in splits and label_column in splits[name].features and -1 not in splits[name][label_column][:1]:
            return name  # GLUE and SWAG publish their test labels as -1
    splits.update(splits["train"].train_test_split(test_size=0.1, seed=seed))
    print("no labelled test or validation split: a tenth of the training rows is held out for the test.")
    return "test"


def used_splits(splits: dict[str, Dataset], test: str) -> list[str]:
    """Return the names of the splits that a training needs."""
    return [name for name in splits if name in ("train", "validation", test)]


def label_names(feature: Any, values: Collection[Any], column: str) -> list[str]:
    """Return the names of the labels in the order of their numbers.

    Args:
        feature: what `datasets` says of the column, of its elements if it holds lists.
        values: the different values in it.
        column: its name.

    Raises:
        ValueError: if the column holds numbers that are not whole: that is regression.
    """
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature.dtype.startswith("float"):
        raise ValueError(f"column {column!r} holds {feature.dtype} numbers; classification needs classes.")
    return [str(value) for value in sorted(values)]


def label_number(value: Any, numbers: dict[str, int], column: str) -> int:
    """Return the number of a label that is given by name, or by number as `ClassLabel` does.

    Raises:
        ValueError: if it does not occur in the training data.
    """
    number = numbers.get(str(value), -1)
    if number < 0:
        raise ValueError(f"column {column!r}: label {value!r} does not occur in the training data.")
    return number


def logits_of(prediction: EvalPrediction) -> Any:
    """Return the logits; some models return other things after them."""
    found = prediction.predictions
    return found[0] if isinstance(found, tuple) else found


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


class OptimizerTrainer(Trainer):
    """A trainer that is told how to make its optimizer, as FSDP and DeepSpeed let it have none from outside.

    Args:
        make_optimizer: makes it of the model.
        settings: those of `Trainer`.
    """

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.make_optimizer = make_optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(self.model)
        return self.optimizer


def trainer_of(
    model: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    task: Task,
    tokenizer: Any,
    arguments: TrainingArguments,
) -> Trainer:
    """Put model and task together; the schedule is that of the arguments."""
    return OptimizerTrainer(
        make_optimizer,
        model=model,
        args=arguments,
        train_dataset=task.data["train"],
        eval_dataset=task.data.get("validation"),
        processing_class=tokenizer,
        data_collator=task.collator,
        compute_metrics=task.metrics,
        callbacks=[MaskCallback()] if isinstance(model, PeftModel) else None,
    )


def score(trainer: Trainer, task: Task, arguments: ScriptArguments) -> dict[str, float]:
    """Return the figures of the split to score at the end, by name."""
    found = trainer.evaluate(task.data[task.test], metric_key_prefix="test")
    beside = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    figures = {name.removeprefix("test_"): value for name, value in found.items() if name.startswith("test_")}
    return {name: value for name, value in figures.items() if name not in beside}


def run(
    kind: type[Arguments],
    description: str,
    prepare: Callable[[dict[str, Dataset], Any, Arguments, int], Task],
    argv: Sequence[str] | None,
    score: Callable[[Trainer, Task, Arguments], dict[str, float]] = score,
) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed.

    Of several processes the first one writes and prints; bytes of the file are among its figures alone.

    Args:
        kind: dataclass of the script's own arguments.
        description: what `--help` says.
        prepare: makes the task of splits, tokenizer, arguments and a seed.
        argv: the command line, by default that of the process.
        score: computes the figures of the trained model.
    """
    arguments, training_arguments = parse(kind, description, argv)
    set_seed(training_arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    budget = {"target_sparsity": arguments.target_sparsity, "target_bytes": arguments.target_bytes}
    try:
        task = prepare(load_splits(arguments), tokenizer, arguments, training_arguments.seed)
        base = task.load(arguments.model_name_or_path)
        model = get_peft_model(base, MaskConfig(task_type=task.task_type, **budget))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    make_optimizer = partial(create_mask_optimizer, lr=training_arguments.learning_rate)
    trainer = trainer_of(model, make_optimizer, task, tokenizer, training_arguments)
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    figures = score(trainer, task, arguments)
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(training_arguments.output_dir)
        if task.labels is not None:  # an adapter does not name them
            (output / "labels.json").write_text(json.dumps(task.labels), encoding="utf-8")
        mask, head = file_bytes(output / "adapter_model.safetensors", model.peft_config["default"].modules_to_save)
        for name, value in figures.items():
            print(f"{task.test} {name} {value:.4f}")
        print(f"{output}: mask {mask:,} bytes, head {head:,} bytes")
        figures |= {"mask_bytes": mask, "head_bytes": head}
    if training_arguments.push_to_hub:
        trainer.push_to_hub(tasks=task.hub_tag, dataset=arguments.dataset_name)
    trainer.accelerator.end_training()
    return figures
