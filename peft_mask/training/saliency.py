"""Candidates chosen by data: the weights whose removal a few batches speak for or against most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from peft_mask.format.packing import zero_positions
from peft_mask.model.mask_model import MaskModel
from peft_mask.model.merging import named_mask_layers
from peft_mask.scores.candidates import by_preference


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
    layers = {name: layer for name, layer in named_mask_layers(base.model) if layer.positions(adapter_name) is not None}
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
