"""The tasks that can be trained from a file, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from transformers import TrainingArguments, set_seed

from peft_mask.recipes import causal_lm, script, text_classification, token_classification
from peft_mask.recipes.rows import source_of
from peft_mask.training.optimizer import HEAD_LR

TASKS = ("text-classification", "token-classification", "causal-lm", "chat")
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": HEAD_LR,  # of a task head, and of the rows of new tokens; a mask has none
    "per_device_eval_batch_size": 64,
    "logging_steps": 0.1,
    "report_to": "none",
}


@dataclass(frozen=True)
class Ready:
    """A training about to start.

    Attributes:
        trainer: with model and data.
        rows: what it learns from and is scored on, in words.
        learn: trains, saves and scores, given the command that the card names; returns figures by name.
    """

    trainer: Any
    rows: Mapping[str, str]
    learn: Callable[[str], dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """How a task is trained.

    Attributes:
        arguments: dataclass of model, data and mask.
        settings: dataclass of the trainer.
        ready: reads data and model.
        defaults: of fields, over those of the dataclasses.
    """

    arguments: type[Any]
    settings: type[TrainingArguments]
    ready: Callable[[Any, Any], Ready]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def recipe_of(task: str | None) -> Recipe:
    """Return the recipe of a task.

    Raises:
        ValueError: if there is no such task.
        ImportError: if TRL, which trains chats, is not installed.
    """
    if task == "text-classification":
        ready = partial(_ready, text_classification.prepare, script.score)
        return Recipe(text_classification.TextArguments, TrainingArguments, ready, {"per_device_train_batch_size": 32})
    if task == "token-classification":
        ready = partial(_ready, token_classification.prepare, script.score)
        return Recipe(token_classification.TagArguments, TrainingArguments, ready, {"per_device_train_batch_size": 32})
    if task == "causal-lm":
        ready = partial(_ready, causal_lm.prepare, causal_lm.score)
        sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        return Recipe(causal_lm.CausalArguments, TrainingArguments, ready, sizes)
    if task == "chat":
        return _chat()
    what = "no task is named" if task is None else f"there is no task {task!r}"
    near = get_close_matches(str(task).lower().replace("_", "-"), TASKS, 1) if task is not None else []
    meant = f"; did you mean {near[0]!r}?" if near else ":"
    raise ValueError(f"{what}{meant} say task: {' or '.join(TASKS)} (in the file, or with --task).")


def _ready(prepare: Any, score: Any, arguments: Any, settings: TrainingArguments) -> Ready:
    ready = script.make_ready(arguments, settings, prepare)
    what = {"train": "to learn from", "validation": "to look at meanwhile"} | {
        ready.task.test: "to test with at the end"
    }
    rows = {
        f"rows {what.get(name, name)}": f"{len(ready.splits[name]):,} of {source_of(ready.splits[name])}"
        for name in script.used_splits(ready.splits, ready.task.test)
    }
    if ready.task.labels is not None:
        rows["labels"] = f"{len(ready.task.labels)}: {shown(ready.task.labels)}"

    def learn(command: str) -> dict[str, float]:
        figures = script.learn(ready, arguments, settings, command, score)
        sizes = ("mask_bytes", "head_bytes")
        return {name if name in sizes else f"{ready.task.test}_{name}": value for name, value in figures.items()}

    return Ready(ready.trainer, rows, learn)


def shown(names: Sequence[str], most: int = 70) -> str:
    """Return as many names as have room in a line, the first at least, and an ellipsis for others.

    >>> shown(["pet", "tree", "house"], 12)
    'pet, tree, ...'
    """
    text, *rest = names
    while rest and len(text) + len(rest[0]) + 2 <= most:
        text = f"{text}, {rest.pop(0)}"
    return f"{text}, ..." if rest else text


def _chat() -> Recipe:
    try:
        from trl import SFTConfig

        from peft_mask.recipes import sft
    except ImportError as error:
        raise ImportError(f"task: chat needs TRL, which cannot be imported ({error}): pip install trl.") from error

    def ready(arguments: Any, settings: Any) -> Ready:
        set_seed(settings.seed)
        trainer, held_out = sft.make_trainer(arguments, settings)
        rows = {
            "answers to learn from": f"{len(trainer.train_dataset):,} of --train_file {arguments.train_file}",
            "answers to test with before and after": f"{len(held_out):,} of "
            + (f"--test_file {arguments.test_file}" if arguments.test_file else f"--train_file {arguments.train_file}"),
        }

        def learn(command: str) -> dict[str, float]:
            figures = sft.learn(trainer, held_out, arguments, settings, command)
            return {f"test_{name}_{when}": value for when, row in figures.items() for name, value in row.items()}

        return Ready(trainer, rows, learn)

    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "save_strategy": "no"}
    return Recipe(sft.ScriptArguments, SFTConfig, ready, sizes)
