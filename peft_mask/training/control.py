"""What steers scores beside the loss: how many weights go, and how far a step follows its gradients.

Each is called with the model once a step and keeps no state: a resumed run goes on to the bit, and the processes of DDP
and FSDP2 do the same. In `Trainer`, `MaskCallback(before_step=[...], after_step=[...])` calls them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.scored import trained_scores
from peft_mask.scores.binarize import binarize_threshold
from peft_mask.scores.init import restart_margin
from peft_mask.scores.order import nth_lowest
from peft_mask.settings.fields import check_number
from peft_mask.tensors.noise import uniform_like
from peft_mask.tensors.sharded import absolute_sum, check_can_change, local, local_part, whole


@dataclass(frozen=True)
class SparsityPenalty:
    """Pull the sparsity of masks toward a target: before each step, add the gradient of a penalty to that of the loss.

        P = weight / 2 * (target - S)^2 * N * g,      dP/ds = weight * (target - S) * g

    S is the fraction of the masked weights of the whole model that are off, straight through in the scores: `dS/ds` is
    -1 / N for each of the N scores. g is the mean absolute gradient that the loss gave them, taken for a constant: so
    `weight` means the same for every model and loss, and need not be searched, or raised in training. At `1 / weight`
    from the target the penalty pulls at every score as hard as the loss does on average.

    For `binarizer="threshold"`, `"sign"` and `"bernoulli"`, of which S counts what would be saved. How far the scores
    can move, about learning rate times steps, still bounds what can be reached.

    Args:
        target: fraction of the masked weights that are to be off.
        weight: how hard it pulls.

    Raises:
        ValueError: if a field is out of range or, when it is called, there are no such scores with a gradient.

    Example:
        for batch in batches:
            model(**batch).loss.backward()
            penalty(model)
            optimizer.step()

    Source: the official code of Zhao et al. 2020 (`lambdas_lr`, off in its published runs) adds `lambda (target - S)^2`
    to the loss, with lambda in gradient ascent from zero. The unit g in place of the ascent is ours.
    """

    target: float
    weight: float = 1000.0

    def __post_init__(self) -> None:
        check_number("target", self.target, above=0.0, below=1.0)
        check_number("weight", self.weight, above=0.0)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        found = list(_compared(model, "SparsityPenalty"))
        grads = [grad for _, grad in _gradients((scores for _, _, scores in found), "SparsityPenalty")]
        off = _total(
            math.prod(layer.rule(adapter).unit) * whole((~binarize_threshold(scores)).sum())
            for adapter, layer, scores in found
        )
        sparsity = off / sum(layer.mask_shape.numel() for _, layer, _ in found)
        mean = _total(absolute_sum(grad) for grad in grads) / sum(grad.numel() for grad in grads)
        pull = self.weight * (self.target - sparsity) * mean
        for grad in grads:
            local(grad).add_(pull.to(grad.device, grad.dtype))


@dataclass(frozen=True)
class HoldSparsity:
    """Hold the sparsity of the whole model: after each step, shift all scores alike so that the lowest are off.

        s := s - t,      t between the k-th and the next of all scores, k = sparsity * number of masked weights

    That is top-k over the whole model, for `binarizer="threshold"`: training decides how many weights of each matrix
    go, and a mask is a function of its own scores all the same, since t is in them. The order over all scores is found
    anew each time, which takes a copy of them.

    Args:
        sparsity: fraction of the masked weights that are off, to the weight but for ties.

    Raises:
        ValueError: if it is out of range or, when it is called, there are no scores with a threshold, of single
            weights, or fewer than are to be off.

    Source: ours; the order over all scores is that of movement pruning (Sanh et al. 2020).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, above=0.0, below=1.0)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        found = list(_compared(model, "HoldSparsity"))
        if any(max(layer.rule(adapter).unit) > 1 for adapter, layer, _ in found):
            raise ValueError('HoldSparsity is for structure="weight": of larger units an exact number has no meaning.')
        device = found[0][2].device
        scores = torch.cat([whole(scores).reshape(-1).to(device, torch.float32) for _, _, scores in found])
        zeros = max(1, round(self.sparsity * sum(layer.mask_shape.numel() for _, layer, _ in found)))
        if zeros >= len(scores):
            raise ValueError(
                f"cannot hold a sparsity of {self.sparsity:g}: {zeros} weights are to be off, {len(scores)} have a "
                "score. Raise candidates."
            )
        shift = (nth_lowest(scores, zeros) + nth_lowest(scores, zeros + 1)) / 2
        for _, _, values in found:
            local(values).sub_(shift.to(values.device))


@dataclass(frozen=True)
class DecayTowardKept:
    """Let scores forget: after each step they move toward where kept ones start, not toward the threshold.

        s := s + rate * (m - s),      m = init_margin, for "bernoulli" its starting log odds

    A weight stays off only while gradients go on asking for it. Plain weight decay is no such thing: it pulls kept
    scores to the threshold, at zero.

    Args:
        rate: from 0 to 1, what decoupled weight decay calls learning rate times weight decay.

    Raises:
        ValueError: if it is out of range or, when it is called, there are no scores with a threshold in training, or
            they are of 16 bits, in which small moves are lost.
    """

    rate: float

    def __post_init__(self) -> None:
        check_number("rate", self.rate, above=0.0, most=1.0)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        configs: Any = model.peft_config
        for adapter, _, scores in _compared(model, "DecayTowardKept"):
            if scores.element_size() < 4:
                raise ValueError('DecayTowardKept is for scores_dtype="float32": in 16 bits its moves would be lost.')
            held = local(scores)
            held.lerp_(torch.full_like(held, restart_margin(configs[adapter])), self.rate)


@dataclass(frozen=True)
class GradientDropout:
    """Drop gradients of scores at random: before each step, set each to zero with a probability.

    Which ones follows from the scores, their names and the seed alone (see `noise.uniform_like`): others in each step,
    the same after a resume and in all processes. With any binarizer and any optimizer. An optimizer with momentum still
    moves a score whose gradient was dropped.

    Args:
        probability: of each gradient to be dropped.
        seed: another seed drops others.

    Raises:
        ValueError: if a field is out of range or, when it is called, there are no scores with a gradient.

    Source: R-AMT (Zheng et al., ICCV 2023) regularizes masks by gradient dropout; this is its plainest form.
    """

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("probability", self.probability, above=0.0, below=1.0)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        names = {
            layer.peft_mask_scores[adapter]: name for name, layer, adapter in _changeable(model, "GradientDropout")
        }
        for scores, grad in _gradients(names, "GradientDropout"):
            key = zlib.crc32(f"{self.seed}/dropout/{names[scores]}".encode())
            dropped = uniform_like(whole(scores), key) < self.probability
            local(grad).masked_fill_(local_part(dropped, of=grad), 0)


def _total(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of numbers that may lie on several devices; nothing is read back."""
    first, *rest = values
    return sum((value.to(first.device) for value in rest), first)


def _changeable(model: nn.Module, who: str) -> Iterator[tuple[str, MaskLayer, str]]:
    """Yield what `trained_scores` does, and raise where a change of scores or gradients would be overwritten."""
    for name, layer, adapter in trained_scores(model):
        check_can_change(layer.peft_mask_scores[adapter], who)
        yield name, layer, adapter


def _gradients(scores: Iterable[Tensor], who: str) -> list[tuple[Tensor, Tensor]]:
    """Return those scores that have a gradient, and the gradients: layers that a task does not use have none."""
    found = [(each, each.grad) for each in scores if each.grad is not None]
    if not found:
        raise ValueError(
            f"{who} needs gradients of scores, and there are none: call it between the backward pass and the step of "
            "the optimizer."
        )
    return found


def _compared(model: nn.Module, who: str) -> Iterator[tuple[str, MaskLayer, Tensor]]:
    """Yield adapter, layer and scores of all that are compared with a threshold and trained."""
    found = False
    for _, layer, adapter in _changeable(model, who):
        rule = layer.rule(adapter)
        if rule.budget is None and rule.group is None:
            found = True
            yield adapter, layer, layer.peft_mask_scores[adapter]
    if not found:
        raise ValueError(
            f'{who} is for scores with a threshold, of which none are in training: use binarizer="threshold", "sign" '
            'or "bernoulli".'
        )
