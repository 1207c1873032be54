"""Long trainings: accuracy on development data along the way, of one seed.

python -m benchmarks.long --data FOLDER [--task trec] [--method mask] [--lr 5e-4] [--steps 10000] [--batch_size 32]
python -m benchmarks.long                      # the page of the results at hand
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.accuracy.__main__ import minilm
from benchmarks.accuracy.methods import GROWING_NOTE, METHODS, grow, mask, mask_adamw
from benchmarks.accuracy.runs import environment
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.training import Method, Setting, accuracy, train
from benchmarks.harness import RESULTS, table, write_page
from benchmarks.runs_file import RunsFile

TITLE = "Long trainings: accuracy on development data, %, along the way"


def larger_mask(sparsity: float, among: float) -> Method:
    """A mask of more zeros than the default's, among more candidates, whose budget grows over a fifth of the steps."""
    fields = {"target_sparsity": sparsity, "candidates": among}
    return Method(f"growing-mask-{sparsity}-of-{among}", GROWING_NOTE, mask(**fields), mask_adamw, (5e-4,), grow)


TRAINED = {
    method.name: method
    for method in (*METHODS.values(), larger_mask(0.01, 0.1), larger_mask(0.02, 0.2), larger_mask(0.05, 0.5))
    if isinstance(method, Method)
}
MARKS = (100, 150, 300, 600, 1000, 1500, *range(2000, 10001, 1000))


def follow(task: Task, method: Method, lr: float, steps: int, setting: Setting) -> dict[str, Any]:
    """Train once with seed 0, the rate falling to 0 over `steps`, and score dev at each of `MARKS`, never test."""
    dev = setting.rows(task, "dev")
    along: dict[int, float] = {}

    def watch(step: int, model: nn.Module) -> None:
        if step in MARKS:
            along[step] = accuracy(model, dev)
            model.train()

    figures = train(task, method, lr, 0, steps, setting, watch=watch)
    run = {"task": task.name, "method": method.name, "lr": lr, "batch_size": setting.batch_size, "steps": steps}
    return {**run, "along": along, **figures, "environment": environment()}


def runs_in(folder: Path) -> RunsFile:
    return RunsFile(folder, ("task", "method", "lr", "batch_size", "steps"))


def long_table(folder: Path) -> str:
    """Return a table of all results in `folder`, a row a training."""
    results = runs_in(folder).read().values()
    marks = [mark for mark in MARKS if any(str(mark) in result["along"] for result in results)]
    rows = []
    for result in results:
        dev = [f"{100 * result['along'][str(mark)]:.1f}" if str(mark) in result["along"] else "" for mark in marks]
        what = (result[name] for name in ("task", "method", "lr", "batch_size", "steps"))
        rows.append((*what, *dev, f"{result['loss']:.1g}"))
    return table(("task", "method", "lr", "batch", "of steps", *marks, "last loss"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a task")
    parser.add_argument("--model", help="name or folder of an encoder; by default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--results", type=Path, default=RESULTS / "long", help="folder of the results")
    parser.add_argument("--task", choices=TASKS, default="trec")
    parser.add_argument("--method", choices=TRAINED, default="mask", metavar="METHOD", help=", ".join(TRAINED))
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.data is not None:
        torch.set_num_threads(options.threads)
        transformers.logging.set_verbosity_error()
        setting = Setting(
            options.data,
            options.model or minilm(),
            batch_size=options.batch_size,
            progress=lambda line: print(line, flush=True),
        )
        result = follow(TASKS[options.task], TRAINED[options.method], options.lr, options.steps, setting)
        runs_in(options.results).add(result)
        runs_in(options.results).tidy()
    write_page_of(options.results)


def write_page_of(folder: Path) -> None:
    write_page(folder, TITLE, "python -m benchmarks.long", long_table(folder))


if __name__ == "__main__":
    main()
