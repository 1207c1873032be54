"""The optimizer of a masked model: sign steps for scores that have a budget, AdamW for all else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_mask.model.scored import trained_scores
from peft_mask.training.sign_adamw import SignAdamW
from peft_mask.training.spending import end_spending

# Recommended learning rates; docs/how-masks-learn.md says why that of the scores hardly matters.
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

    A new optimizer is a new training: if one before was interrupted while its budget grew, this one has all of it.

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
    end_spending(model)
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
