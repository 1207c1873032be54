"""A task of the paper in the setting of its official code, for whoever has a GPU and the Hub.

    python -m reproduction.paper --task mrpc --output_dir out
    python -m reproduction.paper --task mrpc --method finetune --learning_rate 3e-5 --output_dir out
    python -m reproduction.paper --task pos --data FOLDER --output_dir out

The first is the official code's own run, of which its README says .863 on development data: BERT-base, blocks 2 to 11,
pooler and random head masked, five per cent off at the start, Adam at a constant 1e-3, batches of 32, ten epochs, seed
7, the best of an evaluation each 60 steps. `FOLDER` holds `train` and `validation` as .csv, .json, .jsonl or .conll
files with the columns of the task's data set, for tasks that the Hub does not have or for data of one's own. Every
argument of `transformers.TrainingArguments` works.
"""

from __future__ import annotations

import json
import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from benchmarks.accuracy.runs import environment
from examples import multiple_choice
from peft_mask import MaskConfig, MaskStatistics, create_mask_optimizer
from peft_mask.recipes import launched, text_classification, token_classification
from peft_mask.recipes.script import FILE_TYPES, ScriptArguments, load_splits, score, trainer_of
from peft_mask.recipes.text_classification import TextArguments
from peft_mask.recipes.token_classification import TagArguments

FIRST_BLOCK = 2  # the lowest that is masked, of BERT's and RoBERTa's twelve and of DistilBERT's six
PATIENCE = 2  # epochs without a better evaluation
RATES = {"mask": 1e-3, "finetune": 5e-5}  # the latter: the middle of the paper's grid; dev is to choose
SCRIPTS = {TextArguments: text_classification, TagArguments: token_classification, ScriptArguments: multiple_choice}


@dataclass(frozen=True)
class PaperTask:
    """One of the eleven.

    Attributes:
        metric: what dev is scored by.
        dataset: name, configuration and revision on the Hub, as far as there are; None: it is not there.
        columns: arguments of the script that name the columns.
        arguments: the class of the script's arguments, which says whether texts, words or choices are classified.
        dev: share of the training data that becomes development data where there is none.
    """

    metric: str
    dataset: tuple[str | None, ...] | None
    columns: dict[str, Any] = field(default_factory=dict)
    arguments: type[ScriptArguments] = TextArguments
    dev: float | None = None

    @property
    def script(self) -> ModuleType:
        """The module of examples/ that encodes and scores."""
        return SCRIPTS[self.arguments]


def _glue(name: str, metric: str, *columns: str) -> PaperTask:
    return PaperTask(metric, (text_classification.GLUE, name), _texts(*columns))


def _texts(*columns: str, label: str = "label") -> dict[str, Any]:
    return {"text_column": list(columns), "label_column": label}


# Data sets whose loading script `datasets` no longer runs are taken as the files the Hub made of them.
FILES = "refs/convert/parquet"
TASKS = {
    "mrpc": _glue("mrpc", "accuracy", "sentence1", "sentence2"),
    "sst2": _glue("sst2", "accuracy", "sentence"),
    "cola": _glue("cola", "matthews_correlation", "sentence"),
    "rte": _glue("rte", "accuracy", "sentence1", "sentence2"),
    "qnli": _glue("qnli", "accuracy", "question", "sentence"),
    # SemEval-2016 task 4B: Twitter allows to hand out the numbers of tweets only
    "sem": PaperTask("accuracy", None, _texts("text")),
    "trec": PaperTask("accuracy", ("CogComp/trec", None, FILES), _texts("text", label="coarse_label"), dev=0.1),
    "ag": PaperTask("accuracy", ("fancyzhx/ag_news",), _texts("text"), dev=0.2),
    # Penn Treebank, sections as of Collins: licensed by the LDC
    "pos": PaperTask("accuracy", None, {"text_column": "tokens", "label_column": "tags"}, TagArguments),
    "ner": PaperTask(
        "f1",
        ("eriktks/conll2003", None, FILES),
        {"text_column": "tokens", "label_column": "ner_tags"},
        TagArguments,
    ),
    "swag": PaperTask("accuracy", ("allenai/swag", "regular"), {}, ScriptArguments),
}


@dataclass
class PaperArguments:
    """What `TrainingArguments` does not say."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}.", "choices": list(TASKS)})
    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Encoder on the Hub, or a folder."})
    method: Literal["mask", "finetune"] = field(default="mask", metadata={"help": "What is trained."})
    data: str | None = field(default=None, metadata={"help": "Folder of train and validation files."})


def splits_of(arguments: PaperArguments) -> tuple[ScriptArguments, dict[str, Dataset]]:
    """Load the training and the development data; the paper's test data are not looked at.

    Raises:
        ValueError: if the task is not on the Hub and no folder is given, or a file is missing in it.
    """
    task = TASKS[arguments.task]
    if arguments.data is not None:
        where = {f"{split}_file": _file(Path(arguments.data), split) for split in ("train", "validation")}
    elif task.dataset is not None:
        names = ("dataset_name", "dataset_config_name", "dataset_revision")
        where = dict(zip(names, task.dataset, strict=False))
    else:
        raise ValueError(f"the data of {arguments.task} are not on the Hub: give a folder that has them with --data.")
    script_arguments = task.arguments(arguments.model_name_or_path, **where, **task.columns)
    splits = load_splits(script_arguments)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=task.dev, seed=0)
        splits = {"train": parts["train"], "validation": parts["test"]}
    return script_arguments, {name: splits[name] for name in ("train", "validation")}


def _file(folder: Path, split: str) -> str:
    found = [str(folder / f"{split}{ending}") for ending in FILE_TYPES if (folder / f"{split}{ending}").is_file()]
    if len(found) != 1:
        raise ValueError(f"expected one file '{split}' in '{folder}' that ends in one of {', '.join(FILE_TYPES)}.")
    return found[0]


def masked(base: PreTrainedModel, task_type: str | None, seed: int) -> PeftModel:
    """Wrap a model as the paper does: the random head is masked like the rest, and nothing else is trained."""
    blocks = list(range(FIRST_BLOCK, base.config.num_hidden_layers))
    # of a tagger or a multiple choice model PEFT need not know what it is for
    named = {"task_type": task_type} if task_type == "SEQ_CLS" else {}
    return get_peft_model(base, MaskConfig.paper(**named, head="masked", layers_to_transform=blocks, seed=seed))


def optimizer_of(model: Any, lr: float) -> torch.optim.Optimizer:
    """Make the optimizer of a masked or of a whole model: one rate for all, and no weight decay."""
    if isinstance(model, PeftModel):
        return create_mask_optimizer(model, lr=lr, mask_lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say, and return the figures that are written to `result.json` in the output folder."""
    parser = HfArgumentParser(
        (PaperArguments, TrainingArguments), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(
        num_train_epochs=10, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=None, seed=7
    )
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=64, logging_steps=60)
    parser.set_defaults(eval_strategy="steps", eval_steps=60, save_steps=60, save_total_limit=1, save_only_model=True)
    parser.set_defaults(load_best_model_at_end=True, dataloader_pin_memory=torch.cuda.is_available())
    arguments, training_arguments = parser.parse_args_into_dataclasses(args=argv)
    paper_task, seed = TASKS[arguments.task], training_arguments.seed
    training_arguments.metric_for_best_model, training_arguments.greater_is_better = paper_task.metric, True
    training_arguments.learning_rate = lr = training_arguments.learning_rate or RATES[arguments.method]
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    try:
        script_arguments, splits = splits_of(arguments)
        task = paper_task.script.prepare(splits, tokenizer, script_arguments, seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    base = task.load(arguments.model_name_or_path)
    model: Any = masked(base, task.task_type, seed) if arguments.method == "mask" else base
    trainer = trainer_of(model, partial(optimizer_of, lr=lr), task, training_arguments)
    batch = training_arguments.train_batch_size * training_arguments.gradient_accumulation_steps
    steps = math.ceil(len(task.data["train"]) / (batch * training_arguments.world_size))
    evaluations = max(1, round(PATIENCE * steps / training_arguments.eval_steps))
    trainer.add_callback(EarlyStoppingCallback(evaluations))
    statistics = MaskStatistics(model)
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    figures = {
        "task": arguments.task,
        "method": arguments.method,
        "model": arguments.model_name_or_path,
        "lr": lr,
        "seed": seed,
        "steps": trainer.state.global_step,
        "metric": paper_task.metric,
        "dev": score(trainer, task, script_arguments),
        **statistics(model),
        "environment": environment(),
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(training_arguments.output_dir)
        (output / "result.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        print(f"{arguments.task}, {arguments.method}: dev {paper_task.metric} {figures['dev'][paper_task.metric]:.4f}")
    launched.keep(trainer)
    trainer.accelerator.end_training()
    return figures


if __name__ == "__main__":
    launched.run(main)
