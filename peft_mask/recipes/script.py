"""What the scripts share: their arguments, data of the Hub or of files, the training, and what is saved and printed."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from datasets import Dataset, load_dataset
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

from peft_mask.recipes import launched
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.files import FILE_TYPES, load_file
from peft_mask.recipes.mask_arguments import MaskArguments, mask_config
from peft_mask.recipes.models import pretrained, told
from peft_mask.recipes.rows import check_columns, hold_out, is_file, source_of
from peft_mask.recipes.trainer import OptimizerTrainer
from peft_mask.training.callback import MaskCallback
from peft_mask.training.optimizer import HEAD_LR, create_mask_optimizer

LABEL_COLUMNS = ("label", "labels", "intent", "category")


@dataclass
class DataArguments(MaskArguments):
    """Model and data; the names are those of transformers' own examples."""

    file_types: ClassVar[Mapping[str, str]] = FILE_TYPES  # endings of files, and what reads them
    model_name_or_path: str = field(metadata={"help": "Model on the Hub, or a folder."})
    model_init_kwargs: str | None = field(
        default=None, metadata={"help": "What else `from_pretrained` is told, a JSON object."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its revision."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local file in its place, of a type that examples/README.md lists."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "File for evaluation during training."})
    test_file: str | None = field(default=None, metadata={"help": "File for the evaluation at the end."})


@dataclass
class ScriptArguments(DataArguments):
    """What `TrainingArguments` does not say."""

    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


Arguments = TypeVar("Arguments", bound=DataArguments)


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
        return pretrained(self.model_class, name, **config)


def set_device_defaults(parser: HfArgumentParser) -> None:
    """Let a parser of `TrainingArguments` choose the accelerator that is there, CUDA, MPS, XPU or another, or the CPU.

    Where there is none, that has to be said: else transformers refuses bf16, which is TRL's default.
    """
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())


def parse(kind: type[Arguments], description: str, argv: Sequence[str] | None) -> tuple[Arguments, TrainingArguments]:
    """Read the command line."""
    parser = HfArgumentParser(
        (kind, TrainingArguments), description=description, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(learning_rate=HEAD_LR, per_device_train_batch_size=32, per_device_eval_batch_size=64)
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    return parser.parse_args_into_dataclasses(args=argv)


def load_splits(arguments: DataArguments) -> dict[str, Dataset]:
    """Load the splits of a data set of the Hub or of local files, by name.

    Raises:
        ValueError: if neither a data set nor a train file is given, or both, or a file cannot be read.
        FileNotFoundError: if a file does not exist.
    """
    if (arguments.dataset_name is None) == (arguments.train_file is None):
        raise ValueError("give either --dataset_name (a data set of the Hub) or --train_file (a local file).")
    if arguments.train_file is None and (arguments.validation_file or arguments.test_file):
        raise ValueError("--validation_file and --test_file go with --train_file, not with --dataset_name.")
    if arguments.dataset_name is not None:
        name = arguments.dataset_name
        splits = dict(load_dataset(name, arguments.dataset_config_name, revision=arguments.dataset_revision))
        for split, rows in splits.items():
            rows.info.description = f"split {split!r} of {name}"
        return splits
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    return {
        split: load_file(f"{split}_file", name, arguments.file_types)
        for split, name in files.items()
        if name is not None
    }


def choose_test_split(splits: dict[str, Dataset], label_column: str, seed: int) -> str:
    """Return the name of the split to score at the end; if none has labels, hold out a tenth of the training rows.

    Raises:
        ValueError: if a file for it has no labels, or the training rows are too few.
    """
    for name in ("test", "validation", "validation_matched"):
        if name in splits and is_file(splits[name]):
            check_columns(splits[name], [label_column])
            return name
        # GLUE and SWAG publish their test labels as -1
        if name in splits and label_column in splits[name].features and -1 not in splits[name][label_column][:1]:
            return name
    splits.update(hold_out(splits["train"], label_column, seed))
    print("no labelled test or validation split: a tenth of the training rows is held out for the test.")
    return "test"


def used_splits(splits: dict[str, Dataset], test: str) -> list[str]:
    """Return the names of the splits that a training needs."""
    return [name for name in splits if name in ("train", "validation", test)]


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


def trainer_of(
    model: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    task: Task,
    arguments: TrainingArguments,
) -> OptimizerTrainer:
    """Put model and task together; the schedule is that of the arguments."""
    return OptimizerTrainer(
        make_optimizer,
        model=model,
        args=arguments,
        train_dataset=task.data["train"],
        eval_dataset=task.data.get("validation"),
        data_collator=partial(task.collator),  # which shows no tokenizer: it is the base's, and not to be saved
        compute_metrics=task.metrics,
        callbacks=[MaskCallback()] if isinstance(model, PeftModel) else None,
    )


def score(trainer: Trainer, task: Task, arguments: DataArguments) -> dict[str, float]:
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
    """Train a mask as a command line says, save it, and return the figures that are printed.

    Of several processes the first one writes and prints; bytes of the file are among its figures alone.

    Args:
        kind: dataclass of the script's own arguments.
        description: what `--help` says.
        prepare: makes the task of splits, tokenizer, arguments and a seed.
        argv: the command line, by default that of the process.
        score: computes the figures of the trained model.

    Raises:
        SystemExit: if the data, the model or the settings are of no use; it says why.
    """
    arguments, training_arguments = parse(kind, description, argv)
    try:
        ready = make_ready(arguments, training_arguments, prepare)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    figures = learn(ready, arguments, training_arguments, command_of(kind, argv, training_arguments), score)
    if ready.trainer.is_world_process_zero():
        sizes = {name: figures[name] for name in ("mask_bytes", "head_bytes")}
        for name in (name for name in figures if name not in sizes):
            print(f"{ready.task.test} {name} {figures[name]:.4f}")
        mask, head = sizes.values()
        print(f"{training_arguments.output_dir}: mask {mask:,} bytes, head {head:,} bytes")
    return figures


@dataclass(frozen=True)
class Ready:
    """A trainer about to start.

    Attributes:
        trainer: with model and optimizer.
        task: what it learns.
        splits: the rows that it came from.
    """

    trainer: OptimizerTrainer
    task: Task
    splits: dict[str, Dataset]


def make_ready(
    arguments: Arguments,
    training_arguments: TrainingArguments,
    prepare: Callable[[dict[str, Dataset], Any, Arguments, int], Task],
) -> Ready:
    """Read data and model, and put a mask around it.

    Raises:
        ValueError: if the data, the model or the settings are of no use; it says why.
        FileNotFoundError: if a file does not exist.
    """
    set_seed(training_arguments.seed)
    splits = load_splits(arguments)
    if "train" not in splits:
        raise ValueError(f"{arguments.dataset_name} has no split 'train'; expected one, found {list(splits)}.")
    tokenizer = pretrained(AutoTokenizer, arguments.model_name_or_path)
    task = prepare(splits, tokenizer, arguments, training_arguments.seed)
    base = task.load(arguments.model_name_or_path, **told(arguments.model_init_kwargs))
    model = get_peft_model(base, mask_config(arguments, task.task_type))
    make_optimizer = partial(create_mask_optimizer, lr=training_arguments.learning_rate)
    return Ready(trainer_of(model, make_optimizer, task, training_arguments), task, splits)


def learn(
    ready: Ready,
    arguments: Arguments,
    training_arguments: TrainingArguments,
    command: str,
    score: Callable[[Trainer, Task, Arguments], dict[str, float]] = score,
) -> dict[str, float]:
    """Train, save the adapter with its card, and return the figures; of the first process also the bytes of the file.

    Args:
        ready: what `make_ready` returns.
        arguments: what the task was made of.
        training_arguments: those of the trainer.
        command: what the card says that was typed.
        score: computes the figures of the trained model.
    """
    trainer, task, splits = ready.trainer, ready.task, ready.splits
    trainer.train(resume_from_checkpoint=checkpoint_of(training_arguments))
    figures = score(trainer, task, arguments)
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(str(training_arguments.output_dir))
        heads = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"].modules_to_save
        mask, head = file_bytes(output / "adapter_model.safetensors", heads or ())
        used = used_splits(splits, task.test)
        scored = arguments.test_file or arguments.validation_file or arguments.train_file
        trainer.finish_card = partial(
            write_card,
            output,
            command,
            task.hub_tag,
            arguments.dataset_name or Path(str(scored)).name,
            figures=dict(figures),
            facts={f"{name} rows": f"{len(splits[name])} of {source_of(splits[name])}" for name in used},
            labels=task.labels,
        )
        trainer.finish_card()
        figures |= {"mask_bytes": mask, "head_bytes": head}
    if training_arguments.push_to_hub:
        trainer.push_to_hub(tasks=task.hub_tag, dataset=arguments.dataset_name)
    launched.keep(trainer)
    trainer.accelerator.end_training()
    return figures


def checkpoint_of(arguments: TrainingArguments) -> str | bool | None:
    """Return what `Trainer.train` is to resume from: a folder, True for the last checkpoint, or None."""
    said = arguments.resume_from_checkpoint
    return {"true": True, "false": None, "": None}.get(str(said).lower(), said) if said is not None else None
