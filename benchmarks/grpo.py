"""Reinforcement learning of a small chat model by `examples.grpo`: masks, LoRA and full fine-tuning, step by step.

    python -m examples.smollm2 smollm2
    python -m benchmarks.grpo --model smollm2 [--arms NAME ...] [--seeds 0 1 2]
    python -m benchmarks.grpo                      # the page of the rows at hand

Each training is a row of `results/grpo/runs.jsonl`: what has a row is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.harness import RESULTS, environment, table, together, write_page
from benchmarks.runs_file import Row, RunsFile
from examples import grpo
from examples.arithmetic import sums

TITLE = "Reinforcement learning of a small chat model"
LARGEST, TRAIN, TEST = 20, 130, 101  # all sums of two numbers up to 20
STEPS, LENGTH = 30, 10
EXAMPLE = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2 + 3 ="},
    {"role": "assistant", "content": "2 + 3 = 5"},
]
NOTE = (
    f"SmolLM2-135M-Instruct is asked for sums of two numbers up to {LARGEST}, after one example: {TRAIN} of them "
    f"to learn from, {TEST} others held out. {STEPS} steps of GRPO, four completions a question. *completions*: of "
    "a step. *reward*: the share that is right, sampled at temperature 1, mean of five steps. *right*: the share "
    "of the held-out sums of which the most likely answer is. Mean and one standard deviation where there are "
    "several seeds."
)
WINDOWS = ((0, 5), (5, 10), (10, 15), (15, 20), (20, 25), (25, 30))


@dataclass(frozen=True)
class Arm:
    """A way to train: arguments of `examples.grpo` beyond those that all share, and completions of a step."""

    about: str
    arguments: tuple[str, ...]
    completions: int = 16


def mask(sparsity: str, *more: str, candidates: str = "magnitude") -> tuple[str, ...]:
    return ("--method", "mask", "--target_sparsity", sparsity, "--candidate_rule", candidates, *more)


def lora(rate: str) -> tuple[str, ...]:
    return ("--method", "lora", "--learning_rate", rate)


def full(rate: str) -> tuple[str, ...]:
    return ("--method", "full", "--learning_rate", rate)


ARMS = {
    "mask-0.0005": Arm("mask, 0.05 %", mask("0.0005")),
    "mask-0.0002": Arm("mask, 0.02 %", mask("0.0002")),
    "mask-0.0001": Arm("mask, 0.01 %", mask("0.0001")),
    "mask-0.00005": Arm("mask, 0.005 %", mask("0.00005")),
    "mask-0.0001-random": Arm("mask, 0.01 %, random candidates", mask("0.0001", candidates="random")),
    "mask-0.0001-off-principal": Arm(
        "mask, 0.01 %, off-principal candidates", mask("0.0001", candidates="off-principal")
    ),
    "mask-0.0005-random": Arm("mask, 0.05 %, random candidates", mask("0.0005", candidates="random")),
    "mask-0.0005-off-principal": Arm(
        "mask, 0.05 %, off-principal candidates", mask("0.0005", candidates="off-principal")
    ),
    "mask-0.0001-half": Arm("mask, 0.01 %, spent after half the steps", mask("0.0001", "--schedule_end", "0.5")),
    "mask-0.0005-beta": Arm("mask, 0.05 %, beta 0.04", mask("0.0005", "--beta", "0.04")),
    "mask-0.0005-64": Arm("mask, 0.05 %", mask("0.0005"), completions=64),
    "mask-0.0001-64": Arm("mask, 0.01 %", mask("0.0001"), completions=64),
    "mask-0.0001-off-principal-64": Arm(
        "mask, 0.01 %, off-principal candidates", mask("0.0001", candidates="off-principal"), completions=64
    ),
    "lora-2e-4": Arm("LoRA r=8, 2e-4", lora("2e-4")),
    "lora-5e-4": Arm("LoRA r=8, 5e-4", lora("5e-4")),
    "lora-1e-3": Arm("LoRA r=8, 1e-3", lora("1e-3")),
    "lora-5e-4-64": Arm("LoRA r=8, 5e-4", lora("5e-4"), completions=64),
    "full-5e-6": Arm("full fine-tuning, 5e-6", full("5e-6")),
    "full-1e-5": Arm("full fine-tuning, 1e-5", full("1e-5")),
    "full-3e-5": Arm("full fine-tuning, 3e-5", full("3e-5")),
}


def runs_in(folder: Path) -> RunsFile:
    return RunsFile(folder, ("arm", "seed"))


def write_problems(folder: Path) -> None:
    """Write `train.jsonl` and `test.jsonl`, the same for all trainings."""
    for split, rows in zip(("train", "test"), sums(LARGEST, TRAIN, TEST, seed=0), strict=True):
        lines = [json.dumps({"prompt": asked(row["prompt"][-1]["content"]), "answer": row["answer"]}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def asked(question: str) -> list[dict[str, str]]:
    """Return a question in the shortest chat in which the model is often right: fewer tokens, faster steps."""
    return [*EXAMPLE, {"role": "user", "content": question.removeprefix("What is ").replace("?", " =")}]


def run(name: str, seed: int, model: str, results: Path) -> None:
    """Train once, unless there is a row."""
    if (name, seed) in runs_in(results).read():
        return
    arm = ARMS[name]
    print(f"{name}, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_problems(Path(folder))
        found = grpo.main(
            [
                *("--model_name_or_path", model, "--output_dir", f"{folder}/out", "--seed", f"{seed}"),
                *("--train_file", f"{folder}/train.jsonl", "--test_file", f"{folder}/test.jsonl"),
                *("--max_steps", f"{STEPS}", "--max_completion_length", f"{LENGTH}", "--logging_steps", "1"),
                *("--per_device_train_batch_size", f"{arm.completions}", "--num_generations", "4"),
                *("--disable_tqdm", "true", *arm.arguments),
            ]
        )
    runs_in(results).add(
        {
            "arm": name,
            "seed": seed,
            "before": found["before"],
            "after": found["after"],
            "bytes": found["saved_bytes"],
            "trained": found["trained_parameters"],
            "seconds": round(found["seconds"], 1),
            "rewards": [entry["reward"] for entry in found["log"]],
            "alike": [entry["frac_reward_zero_std"] for entry in found["log"]],  # groups that said nothing
            "entropy": [round(entry["entropy"], 4) for entry in found["log"]],
            "environment": environment(),
        }
    )


def write_page_of(folder: Path) -> None:
    rows = list(runs_in(folder).read().values())
    if not rows:
        return
    header = ["method", "completions", "seeds", *(f"reward, {a + 1}-{b}" for a, b in WINDOWS)]
    header += ["right before, %", "after, %", "bytes"]
    lines = [_line(arm, own) for name, arm in ARMS.items() if (own := [row for row in rows if row["arm"] == name])]
    where = together([row["environment"] for row in rows])
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    footer = f"{where['cpu']}, {where['threads']} threads; {versions}; {where['date']}."
    write_page(folder, TITLE, "python -m benchmarks.grpo", f"{NOTE}\n\n{table(header, lines)}\n\n{footer}")


def _line(arm: Arm, rows: Sequence[Row]) -> list[str]:
    rewards = [f"{statistics.mean(statistics.mean(row['rewards'][a:b]) for row in rows):.2f}" for a, b in WINDOWS]
    right = [_mean([100 * row[name] for row in rows]) for name in ("before", "after")]
    size = f"{round(statistics.mean(row['bytes'] for row in rows)):,}"
    return [arm.about, f"{arm.completions}", f"{len(rows)}", *rewards, *right, size]


def _mean(values: Sequence[float]) -> str:
    told = f"{statistics.mean(values):.0f}"
    return f"{told} ± {statistics.stdev(values):.0f}" if len(values) > 1 else told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the chat model")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "grpo")
    options = parser.parse_args(arguments)
    if options.model is not None:
        torch.set_flush_denormal(True)
        transformers.logging.set_verbosity_error()
        for seed in options.seeds:
            for name in options.arms:
                run(name, seed, options.model, options.results)
        runs_in(options.results).tidy()
    write_page_of(options.results)


if __name__ == "__main__":
    main()
