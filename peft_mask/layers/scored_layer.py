"""What a layer knows of adapters with scores: their rules, their budgets and candidates, and the mask in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from peft_mask.layers.bits import check_not_traced
from peft_mask.layers.casting import Integers, Scores
from peft_mask.layers.found import Found
from peft_mask.layers.merging import MergingLayer
from peft_mask.layers.resting import Rest, Resting
from peft_mask.scores.candidates import candidates_without, checked_positions, choose_candidates, moved_scores
from peft_mask.scores.init import initial_scores
from peft_mask.scores.packed_positions import in_full, pack_positions
from peft_mask.scores.rules import Rule, rule_for
from peft_mask.settings.config import MaskConfig


class ScoredLayer(MergingLayer):
    """A layer with `peft_mask_scores[adapter]` and, if only candidates have one, `peft_mask_positions[adapter]`."""

    packs_positions = False  # a byte each in place of four, which are unpacked twice a step
    looks_for_zeros = True  # in its whole weight, where a budget has some off

    def __init__(self) -> None:
        super().__init__()
        self.peft_mask_scores = Scores()
        self.peft_mask_positions = Integers()
        self._rules: dict[str, Rule] = {}
        self._versions: dict[str, int] = {}  # of scores when they were made, as autograd counts changes
        self._resting = Resting()
        self.found = Found()

    def add_scores(self, adapter_name: str, config: MaskConfig, name: str, weight: torch.Tensor) -> None:
        """Give an adapter the scores it starts with."""
        positions = choose_candidates(weight, config, name)
        if positions is not None:
            self.peft_mask_positions[adapter_name] = self.as_kept(positions)
        rule = self._rules[adapter_name] = self.rule_for(config, name)
        scores = initial_scores(weight, config, name, positions, rule.unit)
        self.peft_mask_scores[adapter_name] = nn.Parameter(scores.to(getattr(torch, config.scores_dtype)))
        self.set_sparsity(adapter_name, config.target_sparsity)

    def begin_scores(self, adapter_name: str) -> None:
        """Remember the scores of an adapter, if it has some, as unchanged from here on."""
        if adapter_name in self.peft_mask_scores:
            self._versions[adapter_name] = _version(self.peft_mask_scores[adapter_name])

    def forget_scores(self, adapter_name: str) -> None:
        """Forget what is known of the scores of an adapter that is deleted."""
        self._rules.pop(adapter_name, None)
        self._resting.begin(adapter_name, Rest())
        self._versions.pop(adapter_name, None)
        self.found.forget()

    @property
    def mask_shape(self) -> torch.Size:
        """Shape of the masks: that of the base weight."""
        return self.stored.shape

    @staticmethod
    def input_dimension_of(base_layer: nn.Module) -> int | None:
        """Return which dimension of a layer's weight is that of its inputs; None if there is no such dimension."""
        return 1

    def rule_for(self, config: MaskConfig, name: str) -> Rule:
        """Return how scores of an adapter become its mask here (see `rules.rule_for`)."""
        return rule_for(config, name, self.mask_shape, self.input_dimension_of(self.get_base_layer()))

    def rule(self, adapter_name: str) -> Rule:
        """Return how the scores of an adapter become its mask."""
        return self._rules[adapter_name]

    def set_sparsity(self, adapter_name: str, sparsity: float | None) -> None:
        """Make a fraction of the weights, at least one unit, the budget of an adapter with scores; None: no budget."""
        device = self.peft_mask_scores[adapter_name].device
        self._rules[adapter_name] = self.rule(adapter_name).with_sparsity(sparsity, self.mask_shape, device)
        self._resting.let_go(adapter_name)

    def rest(self, adapter_name: str, zeros: int | None, warning: str | None = None) -> None:
        """Hold the mask of an adapter with scores to so many zeros, and keep a warning, until it is trained."""
        self._resting.begin(adapter_name, Rest(zeros, warning))

    def zeros_at_rest(self, adapter_name: str) -> int | None:
        """Return how many weights the mask of an adapter is held to until it is trained, or None."""
        return self._resting.zeros(adapter_name)

    def zeros_in_force(self, adapter_name: str) -> int | None:
        """Return how many single weights a budget switches off now; None if there is no budget of such."""
        rule = self.rule(adapter_name)
        return rule.count_off(self.zeros_at_rest(adapter_name)) if rule.by_position else None

    def scores_changed(self, adapter_name: str) -> bool:
        """Return whether the scores of an adapter were trained, set or loaded since they were made."""
        return _version(self.peft_mask_scores[adapter_name]) != self._versions.get(adapter_name)

    def has_budget(self, adapter_name: str) -> bool:
        """Return whether the number of weights that an adapter switches off is given."""
        return adapter_name in self._rules and self._rules[adapter_name].budget is not None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # what `to`, `cuda` and the like come down to
        self.found.forget()
        for adapter_name, scores in self.peft_mask_scores.items():
            self._rules[adapter_name] = self.rule(adapter_name).to(scores.device)
        return self

    def positions(self, adapter_name: str) -> torch.Tensor | None:
        """Return the positions of the weights that have a score in an adapter, or None if all have."""
        kept = self._kept_positions(adapter_name)
        return None if kept is None else in_full(kept, self.mask_shape.numel())

    def _kept_positions(self, adapter_name: str) -> torch.Tensor | None:
        if adapter_name not in self.peft_mask_positions:
            return None
        return cast(torch.Tensor, self.peft_mask_positions[adapter_name])

    def as_kept(self, positions: torch.Tensor) -> torch.Tensor:
        """Return positions as the layer keeps them: as they are, or packed."""
        return pack_positions(positions, self.mask_shape.numel()) if self.packs_positions else positions

    def checked_candidates(self, adapter_name: str, positions: torch.Tensor, name: str) -> torch.Tensor:
        """Return positions as an adapter's candidates: ascending, of the dtype and on the device of those it has.

        Raises:
            ValueError: if they cannot be its candidates; the message names the module.
        """
        if (current := self.positions(adapter_name)) is None:
            raise ValueError(f"every weight of '{name}' has a score: set candidates in MaskConfig for a choice.")
        return checked_positions(positions, len(current), self.mask_shape.numel(), name).to(current)

    def candidates_without(self, adapter_name: str, protected: torch.Tensor, name: str) -> torch.Tensor:
        """Return what an adapter's candidates are without weights that are to be kept (see `checked_candidates`).

        Raises:
            ValueError: if there are no such positions, or no such candidates; the message names the module.
        """
        if (current := self.positions(adapter_name)) is None:
            raise ValueError(f"every weight of '{name}' has a score: set candidates in MaskConfig to protect some.")
        flat = protected.detach().reshape(-1)
        numel = self.mask_shape.numel()
        if flat.is_floating_point() or flat.dtype == torch.bool or not ((flat >= 0) & (flat < numel)).all():
            raise ValueError(
                f"cannot protect weights of '{name}': expected integers from 0 to {numel - 1}, got {flat.dtype} from "
                f"{flat.min() if len(flat) else 'nothing'} to {flat.max() if len(flat) else 'nothing'}."
            )
        weight = self.unmerged_weight()
        try:
            new = candidates_without(current.long(), flat.to(current.device, torch.int64), weight.to(current.device))
        except ValueError as error:
            raise ValueError(f"cannot protect weights of '{name}': {error}.") from error
        return new.to(current)

    @torch.no_grad()
    def set_candidates(self, adapter_name: str, positions: torch.Tensor) -> None:
        """Give an adapter's scores to the weights at `positions` (see `checked_candidates`), in the same tensors."""
        scores = self.peft_mask_scores[adapter_name]
        scores.copy_(moved_scores(scores, cast(torch.Tensor, self.positions(adapter_name)), positions))
        self.move_positions(adapter_name, positions)

    def move_positions(self, adapter_name: str, positions: torch.Tensor) -> None:
        """Let an adapter's scores be those of the weights at other positions, as many, in the same tensor."""
        kept = cast(torch.Tensor, self.peft_mask_positions[adapter_name])
        kept.copy_(self.as_kept(positions.to(kept.device)))

    def _scores_in_force(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return scores, mask and positions of a trained adapter, as the functions on tensors want to know them."""
        check_not_traced()
        scores, positions = self.peft_mask_scores[adapter_name], self.positions(adapter_name)
        scores = self._resting.until_trained(adapter_name, scores)
        rule, most = self.rule(adapter_name), self.zeros_at_rest(adapter_name)
        mask = None
        if positions is not None or not rule.plain:  # else these functions have a fast path
            drawn = self.training and most is None
            mask = rule.mask_in_training(scores.detach()) if drawn else rule.mask(scores.detach(), most)
        return rule.estimator(scores), mask, positions

    def _trained(
        self, adapter_name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return scores, mask, positions, and where the mask is off if that is known in place of the mask."""
        rule = self.rule(adapter_name)
        if not rule.by_position:
            return *self._scores_in_force(adapter_name), None
        check_not_traced()
        scores, most = self.peft_mask_scores[adapter_name], self.zeros_at_rest(adapter_name)

        def find() -> torch.Tensor:
            return rule.off(scores, self.positions(adapter_name), self.mask_shape, most)

        off = self.found.off(adapter_name, scores.device, find)
        return self._resting.until_trained(adapter_name, scores), None, self._kept_positions(adapter_name), off


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
