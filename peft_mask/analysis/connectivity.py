"""Paths between two sets of weights: the line segment, and a curve that is trained to stay where the loss is low."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft_mask.analysis.adapters import write_weights
from peft_mask.analysis.evaluation import Batch


class Curve:
    """A Bezier curve between two sets of weights; without bends the line segment.

        phi(t) = sum over i = 0..n+1 of C(n+1, i) (1 - t)^(n+1-i) t^i w_i,    0 <= t <= 1

    where w_0 and w_(n+1) are the end points, which never change, and w_1, ..., w_n the bends, which start evenly spaced
    on the segment, so that the curve is at first the segment. Without bends phi(t) = (1 - t) W0 + t W1.

    Args:
        start: weights at t = 0, as `effective_weights` returns; all that is not floating point is taken from here.
        end: weights at t = 1, with the same names and shapes.
        bends: how many points between them can be trained. Each is a copy of the model.

    Raises:
        ValueError: if the end points are not of one model.

    Source: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs"; Zhao et al. 2020 use
    the segment and, in appendix B, three bends.

    Example:
        >>> curve = Curve({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])})
        >>> curve(0.25)["w"]
        tensor([1.])
    """

    def __init__(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], bends: int = 0) -> None:
        if start.keys() != end.keys():
            raise ValueError(
                "cannot connect weights of different models: only at the start "
                f"{sorted(start.keys() - end.keys())[:4] or 'none'}, only at the end "
                f"{sorted(end.keys() - start.keys())[:4] or 'none'}."
            )
        for name, tensor in start.items():
            if tensor.shape != end[name].shape:
                raise ValueError(
                    f"cannot connect '{name}': its shapes are {tuple(tensor.shape)} and {tuple(end[name].shape)}."
                )
        if bends < 0:
            raise ValueError(f"bends must be at least 0, got {bends}.")
        self._start, self._end = dict(start), dict(end)
        self._bends = [
            {
                name: torch.lerp(start[name].detach(), end[name].detach(), i / (bends + 1)).requires_grad_()
                for name in start
                if start[name].is_floating_point()
            }
            for i in range(1, bends + 1)
        ]

    def __call__(self, t: float) -> dict[str, Tensor]:
        """Return the weights at `t`; gradients reach the bends."""
        coefficients = bernstein(len(self._bends) + 1, t)
        weights = {}
        for name, start in self._start.items():
            if not start.is_floating_point():
                weights[name] = start
                continue
            point = coefficients[0] * start.detach() + coefficients[-1] * self._end[name].detach()
            for coefficient, bend in zip(coefficients[1:-1], self._bends, strict=True):
                point = point + coefficient * bend[name]
            weights[name] = point
        return weights

    def parameters(self) -> list[Tensor]:
        """Return what an optimizer trains: the tensors of the bends."""
        return [tensor for bend in self._bends for tensor in bend.values()]


def bernstein(degree: int, t: float) -> list[float]:
    """Return the weights of the `degree + 1` points of a Bezier curve at `t`.

    >>> bernstein(2, 0.5)
    [0.25, 0.5, 0.25]
    """
    return [math.comb(degree, i) * (1 - t) ** (degree - i) * t**i for i in range(degree + 1)]


def train_curve(
    model: nn.Module,
    curve: Curve,
    batches: Iterable[Batch],
    lr: float,
    seed: int = 0,
    loss: Callable[[object], Tensor] = lambda output: output.loss,  # type: ignore[attr-defined]
) -> list[float]:
    """Train the bends of a curve so that the loss along it is low: for each batch at one random point of it.

    Minimizes E over t ~ U(0, 1) of L(phi(t)) with Adam.

    Args:
        model: the plain model whose weights the curve is of; it is not changed. Whether it drops out is its mode's
            matter: `model.eval()` trains without.
        curve: a curve with bends, which are changed.
        batches: keyword arguments of the model, one step each.
        lr: Adam's learning rate.
        seed: of the points.
        loss: what to minimize, of the model's output.

    Returns:
        The loss of each step.

    Raises:
        ValueError: if the curve has no bends.

    Source: Garipov et al. 2018, section 3; official code of Zhao et al. 2020, `mode_connecter.py`.
    """
    if not curve.parameters():
        raise ValueError("the curve has no bends to train: make it with Curve(start, end, bends=3).")
    optimizer = torch.optim.Adam(curve.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for batch in batches:
        t = float(torch.rand((), generator=generator))
        value = loss(functional_call(model, curve(t), kwargs=dict(batch)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def scan(
    model: nn.Module, curve: Curve, score: Callable[[nn.Module], float], points: int = 11
) -> list[dict[str, float]]:
    """Score the model along a curve.

    Args:
        model: the plain model whose weights the curve is of; it is not changed, a copy is.
        curve: segment or curve.
        score: of a model, such as `lambda model: accuracy(model, batches)`.
        points: how many, evenly spaced from t = 0 to t = 1; at least 2.

    Returns:
        A row a point: `t` and `score`.

    Raises:
        ValueError: if there are fewer than two points, or the weights are of another model.

    Source: `scan_curves` in the official code of Zhao et al. 2020.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}.")
    moved, rows = copy.deepcopy(model), []
    for i in range(points):
        t = i / (points - 1)
        with torch.no_grad():
            write_weights(moved, curve(t))
        rows.append({"t": t, "score": score(moved)})
    return rows


def barrier(rows: Iterable[Mapping[str, float]]) -> float:
    """Return how far the score falls below the straight line between the scores of the end points, at worst.

    Zero or below for a path that stays as good as its ends: "connected".

    Args:
        rows: what `scan` returns.

    Source: the error barrier of Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis".

    >>> barrier([{"t": 0.0, "score": 1.0}, {"t": 0.5, "score": 0.25}, {"t": 1.0, "score": 0.5}])
    0.5
    """
    path = list(rows)
    first, last = path[0]["score"], path[-1]["score"]
    return max((1 - row["t"]) * first + row["t"] * last - row["score"] for row in path)
