"""How the scores of an adapter become its mask in one layer: what its configuration says, with what the layer knows."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass, field
from typing import cast

import torch

from peft_mask.format.packing import bits_from_positions, pack_bits
from peft_mask.scores.binarize import binarize_bernoulli, binarize_groups, binarize_threshold, binarize_topk, bounded
from peft_mask.scores.budget import budget_zeros
from peft_mask.scores.functional import per_weight
from peft_mask.scores.off import off_positions
from peft_mask.scores.units import unit_shape
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import Binarizer


@dataclass(frozen=True)
class Budget:
    """How many scores are off: for Python, which reads numbers, and for `torch.compile`, which compiles for them.

    Attributes:
        zeros: the number.
        most: the largest that it has been. This is compiled for, and only another one is compiled for anew.
        tensor: the number, int64 without dimensions, where the scores are. It alone differs while a budget grows.
    """

    zeros: int
    most: int
    tensor: torch.Tensor = field(compare=False)

    @classmethod
    def of(cls, zeros: int, before: Budget | None, device: torch.device) -> Budget:
        """Return a budget in the place of another one, or of none."""
        most = zeros if before is None else max(zeros, before.most)
        device = torch.device("cpu") if device.type == "meta" else device  # until the scores are loaded
        return cls(zeros, most, torch.full((), zeros, dtype=torch.int64, device=device))

    def to(self, device: torch.device) -> Budget:
        """Return the budget for scores on a device."""
        return self if self.tensor.device == device else Budget.of(self.zeros, self, device)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask of scores with this budget."""
        if torch.compiler.is_compiling():
            return binarize_topk(scores, self.tensor.to(scores.device), self.most)
        return binarize_topk(scores, self.zeros)


@dataclass(frozen=True)
class Rule:
    """A binarizer with its settings.

    Attributes:
        binarizer: as in `MaskConfig`.
        budget: how many scores `"topk"` switches off; None: no budget, all below the threshold are off.
        group: N and M of `"n:m"`.
        dimension: along which its groups lie.
        key: what tells the draws of `"bernoulli"` apart from those of other layers and seeds.
        unit: the block of the weight that one score governs.
        tokens: fraction of the tokens whose gradients a layer uses in training, where it can choose.
    """

    binarizer: Binarizer
    budget: Budget | None = None
    group: tuple[int, int] | None = None
    dimension: int = -1
    key: int = 0
    unit: tuple[int, ...] = ()
    tokens: float = 1.0

    def units(self, shape: torch.Size) -> int:
        """Return how many scores a weight of this shape has, if all of it has some."""
        return shape.numel() // math.prod(self.unit)

    def with_sparsity(self, sparsity: float | None, shape: torch.Size, device: torch.device) -> Rule:
        """Return the rule with a budget: a fraction of the scores of a weight, at least one; None: no budget.

        `device` is that of the scores.
        """
        if sparsity is None:
            return dataclasses.replace(self, budget=None)
        zeros = budget_zeros(self.units(shape), sparsity)
        return dataclasses.replace(self, budget=Budget.of(zeros, self.budget, device))

    def to(self, device: torch.device) -> Rule:
        """Return the rule for scores on a device."""
        return self if self.budget is None else dataclasses.replace(self, budget=self.budget.to(device))

    @property
    def zeros(self) -> int | None:
        """How many scores a budget switches off; None if there is no budget."""
        return None if self.budget is None else self.budget.zeros

    @property
    def plain(self) -> bool:
        """Whether the mask is `scores >= 0` also in training, for which there is a fast path."""
        return self.budget is None and self.binarizer not in ("bernoulli", "n:m")

    def mask(self, scores: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Return what scores come to in evaluation and on saving: bool, of their shape, True for what is kept.

        Args:
            scores: the scores.
            most: how many weights to switch off, if not the whole of a budget.
        """
        if self.budget is not None:
            if most is None:
                return self.budget.mask(scores)
            return binarize_topk(scores, min(self.budget.zeros, most // math.prod(self.unit)))
        if self.group is not None:
            return binarize_groups(scores, *self.group, self.dimension)
        return binarize_threshold(scores)

    @property
    def by_position(self) -> bool:
        """Whether a mask is best known by the few weights that are off: those of a budget of single weights."""
        return self.budget is not None and math.prod(self.unit) == 1

    def off(
        self, scores: torch.Tensor, positions: torch.Tensor | None, shape: torch.Size, most: int | None = None
    ) -> torch.Tensor:
        """Return where `mask(scores, most)` is off, as positions in a weight of this shape (see `off_positions`).

        Only with `by_position`.
        """
        budget = cast(Budget, self.budget)
        if most is None and torch.compiler.is_compiling():
            zeros = budget.tensor.to(scores.device)
            return off_positions(scores, positions, shape.numel(), zeros, budget.most)
        count = self.count_off(most)
        return off_positions(scores, positions, shape.numel(), count, count)

    def count_off(self, most: int | None = None) -> int:
        """Return how many single weights are off at most; only with `by_position`."""
        zeros = cast(Budget, self.budget).zeros
        return zeros if most is None else min(zeros, most)

    def packed_mask(
        self, scores: torch.Tensor, shape: torch.Size, positions: torch.Tensor | None = None, most: int | None = None
    ) -> torch.Tensor:
        """Return what scores come to as packed bits, uint8 of shape (rows, ceil(columns / 8)).

        Args:
            scores: the scores of a layer, of a checkpoint or of all shards.
            shape: shape of the weight.
            positions: of the candidates whose scores they are, or None if every weight or unit has one.
            most: how many weights to switch off, if not the whole of a budget.
        """
        kept = self.mask(scores.detach(), most)
        if positions is None:
            return pack_bits(per_weight(kept, shape))
        return bits_from_positions(positions.to(kept.device)[~kept].long(), shape, kept=False)

    def mask_in_training(self, scores: torch.Tensor) -> torch.Tensor:
        """Return what scores come to in a step of training: another mask if it is drawn, else the same."""
        if self.binarizer == "bernoulli":
            return binarize_bernoulli(scores, self.key)
        return self.mask(scores)

    def estimator(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as straight-through gradients are to reach them."""
        return bounded(scores) if self.binarizer == "sign" else scores


def rule_for(config: MaskConfig, name: str, shape: torch.Size, dimension: int | None) -> Rule:
    """Return the rule of an adapter in one layer, without a budget yet.

    Args:
        config: the adapter's configuration.
        name: path of the module.
        shape: shape of the weight.
        dimension: that of the weight's inputs; None if it has none, which `"n:m"` needs, and most structures.

    Raises:
        ValueError: if the weight has no such units as `structure` says; the bare reason.
    """
    unit = unit_shape(shape, config.structure, dimension, config.head_size)
    key = zlib.crc32(f"{config.seed}/{name}".encode())
    axis = -1 if dimension is None else dimension
    return Rule(config.binarizer, None, config.group, axis, key, unit, config.gradient_tokens)
