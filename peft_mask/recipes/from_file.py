"""`train`: fields of a file and of flags -> a trained adapter, with its card and the fields beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, ProgressCallback

from peft_mask.format.mask_file import read_headers
from peft_mask.recipes.fields import FieldParser, command_of, read_yaml, without_secrets, words_of, write_yaml
from peft_mask.recipes.progress import Progress
from peft_mask.recipes.script import checkpoint_of, set_device_defaults
from peft_mask.recipes.tasks import DEFAULTS, TASKS, Recipe, recipe_of
from peft_mask.server.loading import quietly
from peft_mask.serving.source import CONFIG, TENSORS

FILE = "task.yaml"
ENDINGS = (".yaml", ".yml", ".json")  # of files of fields


@dataclass(frozen=True)
class Training:
    """What was asked for.

    Attributes:
        task: its name.
        fields: that were given, by name.
        recipe: of the task.
        arguments: model, data and mask.
        settings: of the trainer.
    """

    task: str
    fields: Mapping[str, Any]
    recipe: Recipe
    arguments: Any
    settings: Any


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        out: folder of the adapter.
        figures: test results and bytes, by name.
        evaluations: what was measured during training, in its order.
        is_first: whether this is the first of several processes, or the only one.
    """

    out: str
    figures: Mapping[str, float]
    evaluations: Sequence[Mapping[str, float]]
    is_first: bool


def parser_of(task: str | None) -> tuple[Recipe, FieldParser]:
    """Return the recipe of a task, and the parser of its fields.

    Raises:
        ValueError: if there is no such task.
        ImportError: if what it needs is not installed.
    """
    recipe = recipe_of(task)
    usage = f"peft-mask train [FILE.yaml] --task {task} [--FIELD VALUE ...]"
    parser = FieldParser((recipe.arguments, recipe.settings), usage=usage)
    parser.add_argument("--task", help="What is learned.")
    set_device_defaults(parser)
    parser.set_defaults(**{**DEFAULTS, **recipe.defaults})
    return recipe, parser


def read(file: str | None, flags: Sequence[str]) -> Training:
    """Read the fields of a file, and of flags over them.

    Args:
        file: YAML, or None.
        flags: words of a command line, `--name value` or `--name=value`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a field does not exist or has no such value, or there is too little to begin with.
        ImportError: if what the task needs is not installed.
    """
    said = {} if file is None else read_yaml(file)
    task = task_of(flags) or said.get("task")
    try:
        recipe, parser = parser_of(None if task is None else str(task))
    except ValueError as error:
        raise ValueError(str(error) if file is None or task_of(flags) else f"{file}: {error}") from None
    written = words_of({**said, "task": task})
    parser.check_names(written, f"{file}: ")
    parser.check_names(flags, "")
    try:
        parser.check_used([*written, *flags])
        fields = parser.given([*written, *flags])
    except ValueError as error:
        named = re.match(r"argument --([a-z0-9_]+)", str(error))
        only_there = file is not None and named and named[1] in said and named[1] not in _names(flags)
        raise ValueError(f"{file}: {error}" if only_there else str(error)) from None
    if fields.get("validation_file") is not None:
        parser.set_defaults(eval_strategy="epoch")
    if fields.get("output_dir") is None:
        raise ValueError("say where to write: output_dir, a new folder.")
    arguments, settings, _ = parser.parse_args_into_dataclasses([*written, *flags])
    return Training(str(task), fields, recipe, arguments, settings)


def _names(flags: Sequence[str]) -> set[str]:
    return {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the file of fields among the words of a command line, or None, and the other words.

    It is the first word, or else one that is no flag's value and ends as such files do, or is a file.

    Raises:
        ValueError: if it cannot be told whether it is the file or a flag's value.
    """
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    for place, word in enumerate(words):
        named = word.endswith(ENDINGS)
        if word.startswith("-") or not (named or Path(word).is_file()):
            continue
        begin = max(before for before in range(place) if words[before].startswith("-"))
        flag, equals, _ = words[begin].partition("=")
        values = place - begin - 1 + bool(equals)  # that the flag has already
        kind = _parser_for(word, words).takes(flag)
        if values == 0 and kind != "may":
            continue  # it is the value
        if kind == "many" and not equals:
            if not named:
                continue
            raise ValueError(
                f"it cannot be told whether {word!r} is the file or one of the values of {flag}; the file's name comes "
                f"first: peft-mask train {word} {flag} ..."
            )
        return word, [*words[:place], *words[place + 1 :]]
    return None, list(words)


def _parser_for(word: str, words: Sequence[str]) -> FieldParser:
    """Return the parser of the task that words name, or that the file does, if it is one; else that of the first."""
    task = task_of(words)
    if task is None:
        with suppress(OSError, ValueError):
            task = read_yaml(word).get("task")
    return parser_of(task if task in TASKS else TASKS[0])[1]


def task_of(words: Sequence[str]) -> str | None:
    """Return the task that flags name."""
    for place, word in enumerate(words):
        if word == "--task" and place + 1 < len(words):
            return words[place + 1]
        if word.startswith("--task="):
            return word.removeprefix("--task=")
    return None


def train(training: Training) -> Trained:
    """Train as the fields say; the output folder then holds the adapter, its card, the labels and the fields.

    Raises:
        ValueError, FileNotFoundError: if the data, the model or the settings are of no use, or the folder is taken.
        ImportError: if a setting needs what is not installed.
    """
    settings = training.settings
    out = Path(settings.output_dir)
    check_free(out, resumed=checkpoint_of(settings) is not None)
    with _without_bars(), quietly():
        ready = training.recipe.ready(training.arguments, settings)
        for callback in (PrinterCallback, ProgressCallback):
            ready.trainer.remove_callback(callback)
        ready.trainer.add_callback(Progress())
        if ready.trainer.is_world_process_zero():
            for name, text in ready.rows.items():
                print(f"{name}: {text}")
            print(f"model: {training.arguments.model_name_or_path}, {_weights(ready.trainer.model)}", flush=True)
        figures = ready.learn(command_of(training.fields))
    ready.trainer.save_state()  # with the curves
    is_first = bool(ready.trainer.is_world_process_zero())
    if is_first:
        masks = sum(length for _, length in read_headers(out / TENSORS).values())  # as `inspect` counts them
        figures = {**figures, "mask_bytes": masks, "file_bytes": (out / TENSORS).stat().st_size}
        write_yaml(training.fields, out / FILE)
    history = ready.trainer.state.log_history
    evaluations = [row for row in history if any(name.startswith("eval_") for name in row)]
    return Trained(str(out), figures, evaluations, is_first)


def check_free(out: Path, resumed: bool) -> None:
    """Raise ValueError if a folder holds what a training would write over, unless that is what is resumed."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output_dir {out}: this is a file; name a new folder.")
    if resumed:
        return
    if any((out / name).exists() for name in (CONFIG, TENSORS)):
        raise ValueError(f"output_dir {out}: this folder holds an adapter; name a new one, or remove that one.")
    if any(out.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {out}: this folder holds checkpoints of a training that did not end; go on with "
            "--resume_from_checkpoint true, or name a new folder."
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let `datasets` not draw a bar for each file of some rows."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _weights(model: Any) -> str:
    """Say how many weights there are and how many of them a mask may switch off."""
    masked = [module for module in model.modules() if hasattr(module, "peft_mask_scores") and module.peft_mask_scores]
    count = sum(module.get_base_layer().weight.numel() for module in masked if hasattr(module, "get_base_layer"))
    return f"a mask over {count:,} weights in {len(masked)} matrices"


__all__ = ["FILE", "Trained", "Training", "parser_of", "read", "split", "task_of", "train", "without_secrets"]
