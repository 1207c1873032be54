"""What a training of masks needs, in any loop: an optimizer with two learning rates, figures, candidates, budgets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from peft_mask.format.packing import count_zeros, entropy_bits, zero_positions
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.mask_model import MaskModel
from peft_mask.scores.candidates import by_preference
from peft_mask.training.control import trained_scores
from peft_mask.training.sign_adamw import SignAdamW

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


def budgets(model: nn.Module) -> list[tuple[MaskLayer, str, float]]:
    """Return the layers of adapters in training that have a budget, the adapter's name and the sparsity it aims at."""
    configs: dict[str, Any] = {}
    for module in model.modules():  # the adapted model may lie inside, as in a SentenceTransformer
        configs |= getattr(module, "peft_config", None) or {}
    return [
        (layer, adapter_name, configs[adapter_name].target_sparsity)
        for _, layer, adapter_name in trained_scores(model)
        if layer.has_budget(adapter_name)
    ]


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
    for layer, adapter_name, sparsity in budgets(model):
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
