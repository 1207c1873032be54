"""The models that the studies look at: each is trained once, by the loop of benchmarks/accuracy, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.accuracy.methods import HEAD_NOTE, METHODS, mask_adamw
from benchmarks.accuracy.runs import SEARCH_SEED, Progress, Run, best_on_dev, train_run
from benchmarks.accuracy.tasks import TASKS as BENCHMARKED
from benchmarks.accuracy.tasks import Split, Task
from benchmarks.accuracy.training import Method, Setting, restored, untrained
from peft_mask import MaskConfig

# Sentiment as in SST-2, of other texts (`reproduction.sentiment` prepares them), beside the tasks of the benchmark.
TASKS = BENCHMARKED | {name: Task(name, "SEQ_CLS", steps=150) for name in ("custrev", "tweets")}


def paper(**fields: Any) -> Callable[[nn.Module, str], nn.Module]:
    """How the paper's setting wraps a model, with a trained head and other `fields` of `MaskConfig`."""

    def build(model: nn.Module, task_type: str) -> nn.Module:
        # With a seed of its own: the head of another task takes other random numbers, and the same seed would start
        # from other masks.
        seed = torch.initial_seed()
        return get_peft_model(model, MaskConfig.paper(task_type=task_type, head="trained", seed=seed, **fields))

    return build


# name -> method and the one rate it is trained with here. That of full fine-tuning is what dev chose for both tasks in
# benchmarks/accuracy; the default mask has none to choose; that of the paper's setting was the better of two in one run
# each on TREC (dev .922; .920 at 3e-3).
WAYS: dict[str, tuple[Method, float]] = {
    "full": (METHODS["full"], 3e-4),  # type: ignore[dict-item]
    "mask": (METHODS["mask"], 5e-4),  # type: ignore[dict-item]
    "paper": (
        Method("paper", f"MaskConfig.paper(head='trained'), AdamW; {HEAD_NOTE}", paper(), mask_adamw, (1e-3,)),
        1e-3,
    ),
}
# what tables and pictures call them
NAMES = {"full": "fine-tuned", "mask": "masked", "paper": "masked, paper's setting"}


@dataclass(frozen=True)
class Models:
    """Trained models by task, way of training and seed.

    `folder` holds a row a training, in `runs.jsonl`, and, while they are needed, its parameters. A model whose
    parameters are not there is trained again.
    """

    setting: Setting
    folder: Path
    steps: int | None = None
    progress: Progress = field(default_factory=Progress)

    def run(self, task: str, way: str, seed: int, lr: float | None = None) -> Run:
        method, chosen = WAYS[way]
        return Run(
            TASKS[task], method, chosen if lr is None else lr, seed, self.steps or TASKS[task].steps, self.folder
        )

    def chosen_rate(self, task: str, way: str) -> float:
        """The rate that development data choose among those of the method, one training each."""
        tries = [self.run(task, way, SEARCH_SEED, lr) for lr in sorted(WAYS[way][0].lrs)]
        return (best_on_dev(tries, self.setting, self.progress) if len(tries) > 1 else tries[0]).lr

    def trained(self, task: str, way: str, seed: int, lr: float | None = None) -> nn.Module:
        run = self.run(task, way, seed, lr)
        if not run.state.exists():
            train_run(run, self.setting, self.progress)
        return restored(run.task, WAYS[way][0], seed, self.setting, run.state)

    def untrained(self, task: str, way: str, seed: int) -> nn.Module:
        """The model of a training before its first step: the same pretrained weights, head and starting masks."""
        return untrained(TASKS[task], WAYS[way][0], seed, self.setting)

    def batches(
        self, task: str, split: Split, rows: int | None = None, batch_size: int = 64
    ) -> list[dict[str, Tensor]]:
        """The first examples of a split, by default all, in order of length, which is the cheapest."""
        found = self.setting.rows(TASKS[task], split)
        order = sorted(range(len(found.pieces))[:rows], key=lambda i: len(found.pieces[i]))
        return [found.batch(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
