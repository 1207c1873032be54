"""Which weights have scores: rules beside those of `MaskConfig`, for `MaskModel.set_candidates`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_mask import MaskLayer
from peft_mask.scores.principal import off_principal, principal

Run = Callable[[Any], Any]
Rule = Callable[[MaskLayer, int, Tensor], Tensor]  # of a layer, how many, and the norms of its inputs: positions
RANK = 64  # of what LIFT and "The Path Not Taken" call the principal part


def set_candidates(model: nn.Module, rule: str, batches: Iterable[Any], run: Run) -> None:
    """Choose the candidates of an adapter anew.

    Args:
        model: a PEFT model with a new mask.
        rule: a name of `RULES`.
        batches: what `run` takes, a few of them.
        run: computes a forward pass of a batch.
    """
    layers = mask_layers(model)
    norms = input_norms(layers, batches, run) if "activation" in rule else dict.fromkeys(layers, torch.empty(0))
    choose = RULES[rule]
    positions = {name: choose(layer, scores_of(layer).numel(), norms[name]) for name, layer in layers.items()}
    cast(Any, model).base_model.set_candidates(positions)


def mask_layers(model: nn.Module) -> dict[str, MaskLayer]:
    inner = cast(nn.Module, cast(Any, model).base_model.model)
    return {name: layer for name, layer in inner.named_modules() if isinstance(layer, MaskLayer)}


def scores_of(layer: MaskLayer) -> Tensor:
    return cast(Any, layer).peft_mask_scores["default"]


def input_norms(layers: dict[str, MaskLayer], batches: Iterable[Any], run: Run) -> dict[str, Tensor]:
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


def magnitudes(layer: MaskLayer) -> Tensor:
    return layer.unmerged_weight().detach().float().abs()


def by_activation(layer: MaskLayer, count: int, norms: Tensor, sign: int = 1) -> Tensor:
    """Take those of largest `|w| * norm of its input`, Wanda's order (Sun et al. 2023, arXiv 2306.11695)."""
    return (sign * magnitudes(layer) * norms).flatten().topk(count).indices


def by_low_rank(layer: MaskLayer, count: int, norms: Tensor) -> Tensor:
    """Take the largest of an approximation of rank `RANK`, LIFT's order (arXiv 2506.00772)."""
    return principal(layer.unmerged_weight(), count, RANK)


def off_low_rank(layer: MaskLayer, count: int, norms: Tensor) -> Tensor:
    """Take the largest but for those, as `candidate_rule="off-principal"` does at half the rank."""
    return off_principal(layer.unmerged_weight(), count, RANK).topk(count).indices


RULES: dict[str, Rule] = {
    "activation": by_activation,
    "activation, smallest": partial(by_activation, sign=-1),
    "low rank": by_low_rank,
    "off the low rank": off_low_rank,
}
