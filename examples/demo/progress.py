"""What a training says while it goes on: a line a quarter, and a first result early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

Peek = Callable[[Any], str]


class Progress(TrainerCallback):
    """Print the step, the time and the loss at each quarter.

    Args:
        peek: says in words how well the model does; called once, after a fifth of the steps, with the model.
    """

    def __init__(self, peek: Peek | None = None) -> None:
        self.peek = peek

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            seconds = time.monotonic() - self.start
            print(f"  step {state.global_step} of {state.max_steps}, {seconds:.0f} s: loss {float(logs['loss']):.2f}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.peek is not None and state.global_step == max(1, state.max_steps // 5):
            model.eval()
            print(self.peek(model), flush=True)
            model.train()
