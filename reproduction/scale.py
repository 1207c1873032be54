"""How much of everything: small on purpose, so that all studies together take an hour or two of one core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """The numbers behind the command's options.

    `rows`: examples of a split that are looked at, the first of them. `points`: of a line. `curve_steps`: batches that
    a curve is trained with. `seeds`: of the ensembles' members. `every`: steps between two snapshots of masks.
    """

    rows: int = 872
    points: int = 11
    curve_steps: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)
    every: int = 15
