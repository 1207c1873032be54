"""What a training says while it goes on, a line at a time."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

BESIDE = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


class Progress(TrainerCallback):
    """Print steps, time and loss where Trainer logs, and what was measured where it evaluates."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            begin = f" from step {state.global_step} on" if state.global_step else ""
            steps = "1 step" if state.max_steps == 1 else f"{state.max_steps} steps"
            print(f"training: {steps}{begin}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            spent = time.monotonic() - self.start
            left = spent / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
            times = f"{spent:.0f} s, about {left:.0f} s left"
            print(f"step {state.global_step} of {state.max_steps}, {times}: loss {float(logs['loss']):.3f}", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items() if name[:5] == "eval_"}
        found = {name: value for name, value in found.items() if name not in BESIDE and isinstance(value, float)}
        if found and state.is_world_process_zero:
            said = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"step {state.global_step} of {state.max_steps}: validation {said}", flush=True)
