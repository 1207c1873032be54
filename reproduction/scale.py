"""How much of everything: small on purpose, so that all studies together take a working day of one core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """The numbers behind the command's options.

    Attributes:
        recipes: of masks, keys of `reproduction.models.WAYS`.
        rows: how many training and development examples are looked at, the first of them; of test, always all.
        points: of a line or curve.
        curve_steps: batches that a curve is trained with.
        seeds: of each figure, and of the members of an ensemble.
        cycles: of the learning rate, each as long as a training, for an ensemble of snapshots.
        every: steps between two snapshots of masks.
        tasks: of a sweep.
        rates: learning rates of the scores, among which development data choose in a sweep.
        sparsities: fractions of zeros at the start, of the sweep over them.
        blocks: how many blocks are masked, in the sweep over them; by default powers of two.
    """

    recipes: tuple[str, ...] = ("mask", "paper")
    rows: int = 872
    points: int = 11
    curve_steps: int = 150
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    cycles: int = 4
    every: int = 15
    tasks: tuple[str, ...] = ("ud_ewt_pos", "trec")
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    sparsities: tuple[float, ...] = (0.01, 0.03, 0.05, 0.1, 0.5, 0.95)
    blocks: tuple[int, ...] | None = None
