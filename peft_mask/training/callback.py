"""The callback for `transformers.Trainer`: figures in its logs, budgets that grow, scores in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from peft_mask.model.saving import keep_scores
from peft_mask.model.uploads import put_scores_back, set_scores_aside
from peft_mask.training.checkpoints import keep_best, record_share, recorded_share, warn_of_best
from peft_mask.training.schedule import SparsitySchedule
from peft_mask.training.spending import all_spent, budgets, end_spending, fill_budget, spend_budget, spent_share
from peft_mask.training.statistics import MaskStatistics, warn_of_unmoved


class MaskCallback(TrainerCallback):
    """Logs the masks' figures beside the loss, and keeps the scores in checkpoints so that training can be resumed.

    Hand it to `Trainer(callbacks=[...])`. Added later, it counts flips from the checkpoint.

    - `resume_from_checkpoint` and `load_best_model_at_end` go on from the very scores. A resumed training ends as if it
      had never stopped.
    - The adapter saved after training holds masks only. So does what `hub_strategy="every_save"` uploads. The
      strategies "checkpoint" and "all_checkpoints" upload scores as well, to resume from elsewhere.
    - With `load_best_model_at_end` the model is the best checkpoint in the end, also where the trainer could not load
      it: an adapter that is not called "default", or a model of sentence-transformers. If that checkpoint is gone, a
      warning says so, and the masks are the last ones.

    A loop of your own calls what this calls: `MaskStatistics` counts, and warns of a training that has moved no score,
    `keep_scores` decides what is saved, `spend_budget` lets a budget grow, `fill_budget` brings a file to the bytes it
    was promised.

    Args:
        schedule: lets the budget grow. None: it is spent whole from the first step on. "auto": it grows as
            `SparsitySchedule.gentle` says, from what masks spend at the start. New masks spend nothing, trained ones
            all of it, those of a training that was interrupted a part. A training that is resumed goes on with the
            share of its checkpoint, and gives no zeros back. What is evaluated or saved before `schedule.end` has fewer
            zeros than the budget. It keeps them so if `load_best_model_at_end` chooses it or the training ends there.
            The next training has the whole budget.
        before_step: called with the model between the backward pass and each step of the optimizer, in this order, such
            as `SparsityPenalty` and `GradientDropout`.
        after_step: called with the model after each step, such as `HoldSparsity` and `DecayTowardKept`.

    Example:
        >>> trainer = Trainer(model=model, callbacks=[MaskCallback()])  # doctest: +SKIP
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
        self._least = 0.0  # the share that is let from the first step of this training on
        self._share: float | None = None  # the share that is let now
        self._before_step, self._after_step = tuple(before_step), tuple(after_step)
        self._started_from: MaskStatistics | None = None
        self._statistics: MaskStatistics | None = None  # in training
        self._first_step = 0  # of this training, which may go on from a checkpoint
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
        if args.load_best_model_at_end:
            warn_of_best(kwargs["model"])
        started_from = self._started_from if state.global_step > 0 else None
        self._statistics = self._started_from = started_from or MaskStatistics(kwargs["model"])
        self._first_step = state.global_step
        self._plan(kwargs["model"], state)
        keep_scores(kwargs["model"])

    def _plan(self, model: nn.Module, state: TrainerState) -> None:
        """Decide how much of its budget a training may spend when, whatever an earlier one has left in the model."""
        before = recorded_share(state)  # of a training that goes on
        self._share, self._least = None, before or 0.0
        if self._chosen == "auto":
            budget = max((sparsity for *_, sparsity in budgets(model)), default=0.0)
            self._schedule = SparsitySchedule.gentle(budget, state.max_steps)
            if before is None:
                self._least = spent_share(model)
        self._spend(model, state, self._least if self._schedule else 1.0)

    def _spend(self, model: nn.Module, state: TrainerState, share: float) -> None:
        if share != self._share:  # when all is spent, there is nothing to do for the rest of the training
            spend_budget(model, share)
            self._share = share
        record_share(state, share)

    def _share_at(self, step: int, steps: int) -> float:
        return 1.0 if self._schedule is None else max(self._least, self._schedule.share(step / steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._spend(kwargs["model"], state, self._share_at(state.global_step, state.max_steps))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for call in self._before_step:
            call(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for call in self._after_step:
            call(kwargs["model"])
        if state.global_step >= state.max_steps:  # so that the last mask is evaluated and saved as it will stay
            self._spend(kwargs["model"], state, 1.0)

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
        stepped = self._statistics is not None and state.global_step > self._first_step
        unmoved = cast(MaskStatistics, self._statistics).unmoved(kwargs["model"]) if stepped else []
        self._statistics = None
        keep_scores(kwargs["model"], enabled=False)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            keep_best(kwargs["model"], state)
        end_spending(kwargs["model"])
        if all_spent(kwargs["model"]):
            fill_budget(kwargs["model"])
        warn_of_unmoved(unmoved)  # last, for a warning may be an error
