"""What training a mask adds to plain `transformers.Trainer`: an optimizer with two learning rates, and a callback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mask.binarize import binarize_threshold
from peft_mask.layer import MaskLayer
from peft_mask.packing import count_zeros, entropy_bits, pack_bits
from peft_mask.state import keep_scores

# Recommended learning rates; how they were found stands in docs/training.md.
HEAD_LR = 5e-3
MASK_LR = 5e-4


def create_mask_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float = HEAD_LR,
    mask_lr: float = MASK_LR,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer with a learning rate of its own for the scores.

    Weight decay never touches scores (it would pull kept weights toward the threshold), nor vectors such as biases and
    norms.

    Args:
        model: a model with masks to train.
        optimizer_cls: optimizer class.
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
    scores = [parameter for _, parameter in _trained_scores(model)]
    if not scores:
        raise ValueError(
            "the model has no mask scores to train: wrap it with get_peft_model(model, MaskConfig(...)), or load the "
            "adapter with is_trainable=True."
        )
    known = {id(parameter) for parameter in scores}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": scores, "lr": mask_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]], **kwargs)


def _trained_scores(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules():
        if isinstance(module, MaskLayer):
            for adapter_name, parameter in module.peft_mask_scores.items():
                if parameter.requires_grad:
                    yield f"{name}.{adapter_name}", parameter


class MaskStatistics:
    """Figures of the masks in training, counted from the scores against where they started.

    Args:
        model: a model with masks to train; its masks now are what flips are counted against.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = {name: _packed(scores) for name, scores in _trained_scores(model)}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of `model` now, over all masks in training.

        Returns:
            `sparsity`: fraction of weights off. `flip_ratio`: fraction of weights whose mask differs from the start.
            `bits_per_weight`: entropy of the masks, sum of `H(zeros / n) n` over the matrices divided by the weights:
            what their file takes, within a few per cent.
        """
        weights = zeros = flips = 0
        bits = 0.0
        for name, scores in _trained_scores(model):
            packed = _packed(scores)
            off = count_zeros(packed, scores.shape)
            weights += scores.numel()
            zeros += off
            bits += entropy_bits(off, scores.numel())
            if name in self._start:
                flips += packed.numel() * 8 - count_zeros(packed ^ self._start[name], (packed.numel() * 8,))
        if not weights:
            return {}
        return {"sparsity": zeros / weights, "flip_ratio": flips / weights, "bits_per_weight": bits / weights}


class MaskCallback(TrainerCallback):
    """Logs the masks' figures beside the loss, and keeps the scores in checkpoints so that training can be resumed.

    A thin door: `MaskStatistics` counts and `keep_scores` decides what is saved; custom loops call these. With it,
    `resume_from_checkpoint` and `load_best_model_at_end` go on from the very scores. The adapter saved after training
    holds masks only.

    Example:
        Trainer(model=model, ..., callbacks=[MaskCallback()])
    """

    def __init__(self) -> None:
        self._statistics: MaskStatistics | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._statistics = MaskStatistics(kwargs["model"])
        keep_scores(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs or self._statistics is None:
            return
        figures = {name: round(value, 6) for name, value in self._statistics(kwargs["model"]).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer has already filed a copy of `logs` there

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep_scores(kwargs["model"], enabled=False)


def _packed(scores: torch.Tensor) -> torch.Tensor:
    return pack_bits(binarize_threshold(scores.detach()))
