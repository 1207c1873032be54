"""Schedules: which share of its budget a mask may spend at each step of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

STEPS_PER_SPARSITY = 4000  # 20 for half a per cent

Kind = Literal["linear", "cubic", "stepwise"]


@dataclass(frozen=True)
class SparsitySchedule:
    """Let the budget of `binarizer="topk"` grow from nothing, as gradual pruning does, instead of spending it at once.

    The first votes are worth little, and half a million weights switched off on their account hurt: the more so the
    larger the budget and the model (docs/experiments.md). `MaskCallback` follows one in `Trainer`, by default what
    `gentle` makes; a loop of one's own calls `spend_budget(model, schedule.share(step / steps))` before each step.

    Args:
        kind: `"linear"`; `"cubic"`, fast at first and slow at the end: `1 - (1 - t)^3`; or `"stepwise"`, in `stages`
            jumps of equal height.
        begin: fraction of the training before which nothing is switched off (but one weight of each matrix).
        end: fraction of the training from which on the budget is spent whole.
        stages: number of jumps of `"stepwise"`.

    Raises:
        ValueError: if a field is out of range; the message names it.

    Source: `"cubic"`: Zhu and Gupta 2017, "To prune, or not to prune". It and steps are in the official code of Zhao et
    al. 2020 (`sparsity_control.py`), though not in the runs of the paper.

    >>> SparsitySchedule("cubic", end=0.5).share(0.25)
    0.875
    """

    kind: Kind = "linear"
    begin: float = 0.0
    end: float = 0.5
    stages: int = 10

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {list(get_args(Kind))}, got {self.kind!r}.")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(
                f"begin and end must be fractions of the training, 0 <= begin < end <= 1, got {self.begin!r} and "
                f"{self.end!r}."
            )
        if type(self.stages) is not int or self.stages < 1:
            raise ValueError(f"stages must be a positive integer, got {self.stages!r}.")

    @classmethod
    def gentle(cls, sparsity: float, steps: int) -> SparsitySchedule:
        """Make the schedule that `MaskCallback` follows by default.

        It is linear over the first fifth of the training; over more, up to half, if 20 steps for each half per cent of
        zeros take longer. So no vote of a decoder spends more than its model bears, and encoders are as good as with
        the whole budget at once (docs/experiments.md).

        Args:
            sparsity: the budget, a fraction of the weights.
            steps: of the training.

        >>> SparsitySchedule.gentle(0.005, steps=1000).end, SparsitySchedule.gentle(0.02, steps=200).end
        (0.2, 0.4)
        """
        return cls("linear", end=min(max(0.2, STEPS_PER_SPARSITY * sparsity / max(steps, 1)), 0.5))

    def share(self, progress: float) -> float:
        """Return the share of the budget, from 0 to 1, that may be spent after a fraction of the training."""
        t = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        if self.kind == "cubic":
            return 1.0 - (1.0 - t) ** 3
        if self.kind == "stepwise":
            return int(t * self.stages) / self.stages
        return t
