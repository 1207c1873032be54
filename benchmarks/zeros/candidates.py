"""Which weights have scores: rules beside those of `MaskConfig`, for `MaskModel.set_candidates`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_mask import MaskLayer

Preference = Callable[[nn.Module, Iterable[Any], Callable[[Any], Any]], dict[str, Tensor]]
RANK = 64  # of what LIFT and "The Path Not Taken" call the principal part


def set_candidates(model: nn.Module, rule: str, batches: Iterable[Any], run: Callable[[Any], Any]) -> None:
    """Choose the candidates of an adapter anew.

    Args:
        model: a PEFT model with a new mask.
        rule: a name of `RULES`.
        batches: what `run` takes, a few of them.
        run: computes a forward pass of a batch.
    """
    layers = mask_layers(model)
    preferences = RULES[rule](layers, batches, run)
    positions = {
        name: preferences[name].flatten().topk(scores_of(layer).numel(), sorted=False).indices
        for name, layer in layers.items()
    }
    cast(Any, model).base_model.set_candidates(positions)


def mask_layers(model: nn.Module) -> dict[str, MaskLayer]:
    inner = cast(nn.Module, cast(Any, model).base_model.model)
    return {name: layer for name, layer in inner.named_modules() if isinstance(layer, MaskLayer)}


def scores_of(layer: MaskLayer) -> Tensor:
    return cast(Any, layer).peft_mask_scores["default"]


def input_norms(layers: dict[str, MaskLayer], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Return the norm of each input of each layer over all tokens of the batches, (inputs,), float32."""
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            own = inputs[0].detach().float().flatten(0, -2).square().sum(0)
            squares[name] = squares.get(name, 0) + own

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def weight_of(layer: MaskLayer) -> Tensor:
    return cast(Tensor, cast(Any, layer).base_layer.weight).detach().float()


def by_activation(
    layers: dict[str, MaskLayer], batches: Iterable[Any], run: Callable[[Any], Any], sign: int = 1
) -> dict[str, Tensor]:
    """Return `|w| * norm of its input`, Wanda's order (Sun et al. 2023, arXiv 2306.11695)."""
    norms = input_norms(layers, batches, run)
    return {name: sign * weight_of(layer).abs() * norms[name] for name, layer in layers.items()}


def after_rank_reduction(layers: dict[str, MaskLayer], *_: Any, sign: int = 1) -> dict[str, Tensor]:
    """Return the magnitudes of the best approximation of rank `RANK`, LIFT's order (arXiv 2506.00772)."""
    return {name: sign * low_rank(weight_of(layer)).abs() for name, layer in layers.items()}


def low_rank(weight: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return (left[:, :RANK] * values[:RANK]) @ right[:RANK]


RULES: dict[str, Preference] = {
    "activation": by_activation,
    "activation, smallest": lambda *given: by_activation(*given, sign=-1),
    "low rank": after_rank_reduction,
    "off the low rank": lambda *given: after_rank_reduction(*given, sign=-1),
}
