"""Super weights: single weights without which a language model is wrecked, found by what they contribute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_mask.format.packing import count_zeros
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.mask_model import MaskModel
from peft_mask.model.matching import listed
from peft_mask.model.merging import named_mask_layers

TRIED = 64


@torch.no_grad()
def super_weights(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    rise: float = 0.01,
    tried: int = TRIED,
) -> dict[str, dict[int, float]]:
    """Find the single weights of masked linear layers without which the loss rises.

    A weight w of output i and input j contributes at most `|w| * max |x_j|`. Those whose contribution is largest beside
    the outputs of their layer, the median over outputs of `max |y|`, are taken out one after the other.

    Args:
        model: a PEFT model with a new mask, which computes as the base model does.
        batches: what `loss` takes, one or a few.
        loss: computes the loss of `model` on a batch, a mean.
        rise: the least rise of the loss, in its unit, for which a weight counts.
        tried: how many weights are taken out; each costs a forward pass of every batch.

    Returns:
        Module name -> position of the weight, in row-major order -> by how much the mean loss rises without it, inf if
        it is then no number; the largest rise first. `MaskModel.protect` takes it. A weight's part is taken off the
        output of its layer, so that in 16 bits the rise is as exact as that output is. The model is as it was before.

    Raises:
        ValueError: if the model has no masked linear layer, or switches weights off already; if there are no batches;
            or if the loss is no finite number.

    Source: Yu et al. 2024, "The Super Weight in Large Language Models", arXiv 2411.07191; they look at `down_proj`.
    """
    layers = {
        name: layer
        for name, layer in named_mask_layers(cast(MaskModel, model.base_model).model)
        if isinstance(layer.get_base_layer(), nn.Linear)
    }
    given = list(batches)
    if not layers or not given:
        raise ValueError(f"super weights are looked for in {len(layers)} masked linear layers by {len(given)} batches.")
    if off := [name for name, layer in layers.items() if _has_zeros(layer)]:
        raise ValueError(f"super weights are those of the base: {listed(off, 3)} have weights switched off already.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        before, largest = _mean(loss, given), _largest_contributions(layers, given, loss, tried)
        if not math.isfinite(before):
            raise ValueError(f"super weights are found by a loss that is finite, got {before}.")
        rises = []
        for module, position in largest:
            with _without(layers[module], position):
                own = _mean(loss, given) - before
                rises.append((math.inf if math.isnan(own) else own, module, position))
    finally:
        for part, mode in modes.items():
            part.training = mode
    found: dict[str, dict[int, float]] = {}
    for own, module, position in sorted(rises, reverse=True):
        if own >= rise:
            found.setdefault(module, {})[position] = own
    return found


def _has_zeros(layer: MaskLayer) -> bool:
    used = [name for name in layer.active_adapters if name in layer.peft_mask_scores or name in layer.peft_mask_bits]
    return bool(layer.merged) or any(count_zeros(layer.packed_mask(name), layer.mask_shape) for name in used)


def _mean(loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> float:
    return sum(float(loss(batch)) for batch in batches) / len(batches)


def _largest_contributions(
    layers: dict[str, MaskLayer], batches: Sequence[Any], loss: Callable[[Any], Tensor], count: int
) -> list[tuple[str, int]]:
    """Return module and position of the weights that contribute most, beside the outputs of their layer."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.numel():  # an expert that no token came to
                return
            for kept, value in ((inputs, given[0]), (outputs, output)):
                largest = value.detach().flatten(0, -2).abs().amax(0).float()
                kept[name] = torch.maximum(kept[name], largest) if name in kept else largest

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    best: list[tuple[float, str, int]] = []
    for name, largest in inputs.items():
        with onloaded(layers[name]):
            weight = layers[name].unmerged_weight().detach().float().abs()
        shares = weight * largest.to(weight.device) / outputs[name].median().to(weight.device).clamp(min=1e-12)
        top = shares.flatten().topk(min(count, shares.numel()))
        best += [(share, name, at) for share, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    return [(name, position) for _, name, position in sorted(best, reverse=True)[:count]]


@contextmanager
def _without(layer: MaskLayer, position: int) -> Iterator[None]:
    """Compute without one weight: its contribution is taken off the output, whatever the weight is stored in."""
    with onloaded(layer):
        weight = layer.unmerged_weight()
        row, column = divmod(position, weight.shape[1])
        value = weight[row, column].item()

    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output[..., row] -= (value * given[0][..., column]).to(output.dtype)
        return output

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
