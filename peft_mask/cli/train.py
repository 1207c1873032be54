"""`peft-mask train`: a file of fields, or flags -> a trained adapter."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from peft_mask.cli.answer import Answer, facts

_HELP = """\
Learn a mask from a file of fields, or from flags of the same names, which win over the file's.

task.yaml:
  task: text-classification     # or token-classification, causal-lm, chat
  model_name_or_path: sentence-transformers/all-MiniLM-L6-v2
  train_file: train.csv         # csv, tsv, json, jsonl, parquet; or dataset_name
  test_file: test.csv           # else a tenth of the training rows is held out
  target_sparsity: 0.005        # fields of MaskConfig
  num_train_epochs: 5           # fields of TrainingArguments
  output_dir: out
"""
_EXAMPLES = """\
examples:
  peft-mask train task.yaml
  peft-mask train task.yaml --target_sparsity 0.002 --output_dir smaller
  peft-mask train task.yaml --resume_from_checkpoint true
  peft-mask train --task chat --help"""


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser; `read` has its fields."""
    one: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="learn a mask: task, data, model and size in a file or as flags",
        description=_HELP,
        epilog=_EXAMPLES,
        usage="peft-mask train [TASK.yaml] [--FIELD VALUE ...] [--json] [--traceback]",
    )
    one.set_defaults(run=run)
    return one


def read(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Put what was typed behind `train`, and is not for all commands, into the options."""
    options.words = list(words)


def run(options: argparse.Namespace) -> Answer:
    """Train."""
    try:
        from peft_mask.recipes import from_file, launched
    except ImportError as error:
        raise ImportError(
            f"a training needs more than the package: pip install 'peft-mask[train]' ({error})."
        ) from error

    if options.fields:
        return Answer({}, from_file.parser_of(from_file.task_of(options.words))[1].format_help())
    with redirect_stdout(sys.stderr):  # so that stdout has what was found alone
        training = from_file.read(*from_file.split(options.words))
        trained = from_file.train(training)
    base = training.arguments.model_name_or_path
    quantize = ["--quantize", "nf4"] if getattr(training.arguments, "load_in_4bit", False) else []
    following = [
        ["peft-mask", "inspect", trained.out],
        ["peft-mask", "merge", trained.out, "--base", base, *quantize, "--out", f"{trained.out.rstrip('/')}-merged"],
    ]
    commands = [shlex.join(words) for words in following]
    data = {
        "task": training.task,
        "out": trained.out,
        "figures": dict(trained.figures),
        "evaluations": list(trained.evaluations),
        "fields": from_file.without_secrets(training.fields),
        "next": commands,
    }
    said = {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        for name, value in trained.figures.items()
    }
    text = "\n".join([facts({**said, "written to": trained.out}), "next:", *(f"  {each}" for each in commands)])
    answer = Answer(data, text)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the first says it, and each ends as scripts do
        launched.run(lambda: trained.is_first and print(answer.json() if options.json else answer.text))
    return answer
