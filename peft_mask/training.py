"""What training a mask adds to plain `transformers.Trainer`: an optimizer with two learning rates, and a callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from peft_mask.candidates import by_preference
from peft_mask.checkpoint import put_scores_back, set_scores_aside
from peft_mask.control import trained_scores
from peft_mask.layer import MaskLayer
from peft_mask.model import MaskModel
from peft_mask.optim import SignAdamW
from peft_mask.packing import count_zeros, entropy_bits, zero_positions
from peft_mask.schedule import SparsitySchedule
from peft_mask.state import keep_scores

# Recommended learning rates; how they were found stands in docs/training.md.
HEAD_LR = 5e-3
MASK_LR = 5e-4


def create_mask_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = SignAdamW,
    *,
    lr: float = HEAD_LR,
    mask_lr: float = MASK_LR,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer with a learning rate of its own for the scores.

    By default the scores of adapters with a budget (`binarizer="topk"`) take sign steps, which keep no state; for them
    any `mask_lr` does the same. All else is trained with AdamW, and so are scores with `binarizer="threshold"`, for
    which `mask_lr` decides how many weights go. Weight decay never touches scores, nor vectors such as biases or norms.

    Args:
        model: a model with masks to train.
        optimizer_cls: optimizer class; with another than `SignAdamW` the scores are trained by it, too.
        lr: learning rate of everything trained that is not a score, such as the task head.
        mask_lr: learning rate of the scores.
        weight_decay: weight decay of matrices that are not scores.
        **kwargs: passed on to `optimizer_cls`.

    Returns:
        The optimizer. Hand it to `Trainer(optimizers=(optimizer, None))`, which adds the schedule of its arguments.

    Raises:
        ValueError: if the model has no scores to train.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_mask import MaskConfig, create_mask_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
        >>> [group["lr"] for group in create_mask_optimizer(model, mask_lr=0.01).param_groups]
        [0.01]
    """
    trained = list(trained_scores(model))
    if not trained:
        raise ValueError(
            "the model has no mask scores to train: wrap it with get_peft_model(model, MaskConfig(...)), or load the "
            "adapter with is_trainable=True."
        )
    signed = issubclass(optimizer_cls, SignAdamW)
    ranked: list[nn.Parameter] = []
    compared: list[nn.Parameter] = []
    for _, layer, adapter in trained:
        (ranked if signed and layer.has_budget(adapter) else compared).append(layer.peft_mask_scores[adapter])
    known = {id(parameter) for parameter in (*ranked, *compared)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        # a group for each matrix, which DeepSpeed's pieces are then of
        *({"params": [scores], "lr": mask_lr, "weight_decay": 0.0, "sign": True} for scores in ranked),
        {"params": compared, "lr": mask_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]], **kwargs)


class MaskStatistics:
    """Figures of the masks in training, counted from the scores against where they started.

    Args:
        model: a model with masks to train; its masks now are what flips are counted against.

    Attributes:
        zeros_at_start: how many weights these switch off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = {}
        self.zeros_at_start = 0
        for name, layer, adapter in trained_scores(model):
            self._start[name] = packed = layer.packed_mask(adapter)
            self.zeros_at_start += count_zeros(packed, layer.mask_shape)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of `model` now, over all masks in training.

        Returns:
            `sparsity`: fraction of weights off. `flip_ratio`: fraction of weights whose mask differs from the start.
            `bits_per_weight`: entropy of the masks, sum of `H(zeros / n) n` over the matrices divided by the weights:
            what their file takes, within a few per cent.
        """
        weights = zeros = flips = 0
        bits = 0.0
        for name, layer, adapter in trained_scores(model):
            packed, shape = layer.packed_mask(adapter), layer.mask_shape
            size, off = shape.numel(), count_zeros(packed, shape)
            weights += size
            zeros += off
            bits += entropy_bits(off, size)
            if name in self._start:
                flips += packed.numel() * 8 - count_zeros(packed ^ self._start[name], (packed.numel() * 8,))
        if not weights:
            return {}
        return {"sparsity": zeros / weights, "flip_ratio": flips / weights, "bits_per_weight": bits / weights}


def saliency_candidates(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """Find the weights whose removal a few batches speak for or against most: `|sum over batches of dL/dmask|`.

    `dL/dmask = dL/d(W * M) * W`, the first-order change of the loss if the weight goes. The sum takes as much memory as
    the masked weights, for as long as this function runs.

    Args:
        model: a PEFT model with masks to train.
        batches: what `loss` takes, a few of them.
        loss: computes the loss of `model` on a batch.
        adapter_name: the adapter whose candidates they are to be.

    Returns:
        For each masked module the positions of as many weights as the adapter has scores, ascending: what
        `model.base_model.set_candidates` takes. Weights that are off now are among them, since no gradient is computed
        of what they would be worth. The model is as it was before.

    Raises:
        ValueError: if the adapter has no scores, or scores of all weights, or the base is quantized.

    Source: SNIP (Lee et al. 2019) and movement pruning (Sanh et al. 2020) rank weights by this.
    """
    base = cast(MaskModel, model.base_model)
    layers = {
        name: module
        for name, module in cast(nn.Module, base.model).named_modules()
        if isinstance(module, MaskLayer) and module.positions(adapter_name) is not None
    }
    if not layers:
        raise ValueError(f"the adapter '{adapter_name}' has no candidates to choose: set candidates in MaskConfig.")
    if quantized := [name for name, layer in layers.items() if layer.stored.exact is False]:
        raise ValueError(
            f"the weights of {quantized} are quantized, and no gradient reaches them: use a candidate_rule of "
            "MaskConfig, or find the candidates on the base model in float32 or bfloat16."
        )
    trained = {p: p.requires_grad for p in model.parameters()}
    weights = [layer.stored.parameter for layer in layers.values()]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            gradients = torch.autograd.grad(loss(batch), weights, allow_unused=True)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                if gradient is not None:
                    total += gradient.float() * weight.detach()
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
    chosen = {}
    for (name, layer), total in zip(layers.items(), sums, strict=True):
        off = zero_positions(layer.packed_mask(adapter_name), layer.mask_shape)
        chosen[name] = by_preference(total.abs_().view(-1), layer.peft_mask_scores[adapter_name].numel(), include=off)
    return chosen


def spend_budget(model: nn.Module, share: float) -> None:
    """Let adapters in training switch off a share of their budget for now; the budget itself stays what it is.

    `MaskCallback(schedule=...)` calls this before each step; a custom loop calls it with `SparsitySchedule.share`.

    Args:
        model: a PEFT model, a transformers model with adapters, or one that contains it, with masks to train.
        share: from 0, one weight of each matrix, to 1, all of it. Adapters without a budget are left alone.

    Raises:
        ValueError: if the share is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1, got {share!r}.")
    for layer, adapter_name, sparsity in _budgets(model):
        layer.set_sparsity(adapter_name, share * sparsity)


def fill_budget(model: nn.Module) -> None:
    """Bring adapters in training that were given `target_bytes` to that size, as their masks are coded.

    `MaskCallback` calls this at the end of training; a custom loop calls it before saving.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MaskModel):
        return
    for adapter_name in {adapter for _, _, adapter in trained_scores(model)}:
        if (target_bytes := tuner.peft_config[adapter_name].target_bytes) is not None:
            try:
                tuner.set_target_bytes(target_bytes, adapter_name)
            except ValueError as error:  # a training is not lost for it
                sparsity = tuner.peft_config[adapter_name].target_sparsity
                warnings.warn(f"the adapter '{adapter_name}' keeps its sparsity of {sparsity:g}: {error}", stacklevel=2)


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
        if self._chosen == "auto":
            from_new = self._statistics.zeros_at_start == 0 or (state.global_step > 0 and started_from is None)
            budget = max((sparsity for *_, sparsity in _budgets(kwargs["model"])), default=0.0)
            self._schedule = SparsitySchedule.gentle(budget, state.max_steps) if from_new else None
        keep_scores(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._schedule is not None:
            spend_budget(kwargs["model"], self._schedule.share(state.global_step / state.max_steps))

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


def _budgets(model: nn.Module) -> list[tuple[MaskLayer, str, float]]:
    """Return the layers of adapters in training that have a budget, the adapter's name and the sparsity it aims at."""
    configs: dict[str, Any] = {}
    for module in model.modules():  # the adapted model may lie inside, as in a SentenceTransformer
        configs |= getattr(module, "peft_config", None) or {}
    return [
        (layer, adapter_name, configs[adapter_name].target_sparsity)
        for _, layer, adapter_name in trained_scores(model)
        if layer.has_budget(adapter_name)
    ]


def _progress_kept(args: TrainingArguments, state: TrainerState) -> float:
    """Return how far the training had come, as schedules count it, when it made the model that it ends with."""
    chosen = args.load_best_model_at_end and state.best_model_checkpoint is not None
    steps = cast(int, state.best_global_step) if chosen else state.global_step
    return 1.0 if steps >= state.max_steps else (steps - 1) / state.max_steps  # as at the beginning of its last step
