"""The callback for `transformers.Trainer`: figures in its logs, budgets that grow, scores in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from peft_mask.model.checkpoint import put_scores_back, set_scores_aside
from peft_mask.model.state import keep_scores
from peft_mask.training.schedule import SparsitySchedule
from peft_mask.training.spending import budgets, fill_budget, spend_budget
from peft_mask.training.statistics import MaskStatistics


class MaskCallback(TrainerCallback):
    """Logs the masks' figures beside the loss, and keeps the scores in checkpoints so that training can be resumed.

    A thin door: `MaskStatistics` counts, `keep_scores` decides what is saved, `fill_budget` brings a file to the bytes
    it was promised; custom loops call these. With it, `resume_from_checkpoint` and `load_best_model_at_end` go on from
    the very scores, and a resumed training ends as if it had never stopped. Hand it to `Trainer(callbacks=[...])`:
    added later, it counts flips from the checkpoint, and takes it that training had started with every weight kept. The
    adapter saved after training holds masks only, and so does what `hub_strategy="every_save"` uploads. The strategies
    "checkpoint" and "all_checkpoints" upload checkpoints to resume from elsewhere, which takes the scores.

    Args:
        schedule: lets the budget grow; None: it is spent whole from the first step on. "auto": it grows as
            `SparsitySchedule.gentle` says if training starts with every weight kept, as with new masks; masks that have
            zeros keep them. What is evaluated or saved before `schedule.end` has fewer zeros than the budget, and keeps
            them so if `load_best_model_at_end` chooses it or the training ends there.
        before_step: called with the model between the backward pass and each step of the optimizer, in this order, such
            as `SparsityPenalty` and `GradientDropout`.
        after_step: called with the model after each step, such as `HoldSparsity` and `DecayTowardKept`.

    Example:
        Trainer(model=model, ..., callbacks=[MaskCallback()])
    """

    def __init__(
        self,
        schedule: SparsitySchedule | Literal["auto"] | None = "auto",
        before_step: Sequence[Callable[[nn.Module], object]] = (),
        after_step: Sequence[Callable[[nn.Module], object]] = (),
    ) -> None:
        if not (schedule is None or schedule == "auto" or isinstance(schedule, SparsitySchedule)):
            raise ValueError(f'schedule must be a SparsitySchedule, "auto" or None, got {schedule!r}.')
        self._chosen = schedule
        self._schedule = None if schedule == "auto" else schedule  # what is followed; of "auto" training decides
        self._share: float | None = None  # what the schedule has let be spent in this training
        self._before_step, self._after_step = tuple(before_step), tuple(after_step)
        self._started_from: MaskStatistics | None = None
        self._statistics: MaskStatistics | None = None  # in training
        self._aside: tuple[Path, Path] | None = None  # a checkpoint's file, and where its scores are meanwhile

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started_from = MaskStatistics(kwargs["model"])  # a resume overwrites these masks before training begins

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        uploads = args.push_to_hub and args.hub_strategy == HubStrategy.EVERY_SAVE
        if uploads and not hasattr(TrainerCallback, "on_push_begin"):
            raise ValueError(
                'hub_strategy="every_save" would upload the scores in the checkpoints: this transformers asks no '
                'callback before it does. Set hub_strategy="end", or use transformers 5.'
            )
        started_from = self._started_from if state.global_step > 0 else None
        self._statistics = self._started_from = started_from or MaskStatistics(kwargs["model"])
        self._share = None
        if self._chosen == "auto":
            from_new = self._statistics.zeros_at_start == 0 or (state.global_step > 0 and started_from is None)
            budget = max((sparsity for *_, sparsity in budgets(kwargs["model"])), default=0.0)
            self._schedule = SparsitySchedule.gentle(budget, state.max_steps) if from_new else None
        keep_scores(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._schedule is None:
            return
        share = self._schedule.share(state.global_step / state.max_steps)
        if share != self._share:  # when all is spent, there is nothing to do for the rest of the training
            spend_budget(kwargs["model"], share)
            self._share = share

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for call in self._before_step:
            call(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for call in self._after_step:
            call(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs or self._statistics is None:
            return
        figures = {name: round(value, 6) for name, value in self._statistics(kwargs["model"]).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer has already filed a copy of `logs` there

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer calls this between writing a checkpoint and copying the adapter in it to the folder it uploads
        if args.hub_strategy != HubStrategy.EVERY_SAVE or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        file, aside = folder / SAFETENSORS_WEIGHTS_NAME, folder / f"{SAFETENSORS_WEIGHTS_NAME}.scores"
        if self._statistics is not None and file.is_file() and set_scores_aside(file, aside):
            self._aside = file, aside

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._aside is not None:
            put_scores_back(*self._aside)
            self._aside = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._statistics = None
        keep_scores(kwargs["model"], enabled=False)
        share = 1.0
        if self._schedule is not None:
            share = self._schedule.share(_progress_kept(args, state))
            spend_budget(kwargs["model"], share)
        if share == 1.0:
            fill_budget(kwargs["model"])


def _progress_kept(args: TrainingArguments, state: TrainerState) -> float:
    """Return how far the training had come, as schedules count it, when it made the model that it ends with."""
    chosen = args.load_best_model_at_end and state.best_model_checkpoint is not None
    steps = cast(int, state.best_global_step) if chosen else state.global_step
    return 1.0 if steps >= state.max_steps else (steps - 1) / state.max_steps  # as at the beginning of its last step
