"""`MaskLayer`: scores or bits of adapters around a base layer, merging and exact unmerging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from peft_mask.format.fingerprint import UNKNOWN, Fingerprint, fingerprint_of
from peft_mask.format.packing import unpack_bits, zero_positions
from peft_mask.layers.bits import BitsDict
from peft_mask.layers.rows import BASE, forward_rows
from peft_mask.scores.candidates import checked_positions, choose_candidates, moved_scores
from peft_mask.scores.functional import apply_mask, masked_weight
from peft_mask.scores.init import initial_scores
from peft_mask.scores.rules import Rule, rule_for
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_taken_away, whole
from peft_mask.tensors.stored import Displaced, StoredWeight


class MaskLayer(nn.Module, BaseTunerLayer):
    """What every masked layer shares: scores or bits of each adapter, merging and exact unmerging.

    An adapter that is trained owns `peft_mask_scores[adapter]`: a parameter of the weight's shape, of a shape that
    divides it where one score governs a block or, where only some weights may go, of one score for each of
    `peft_mask_positions[adapter]` (row-major, ascending). An adapter that is only used owns `peft_mask_bits[adapter]`,
    the packed mask: uint8 of shape (rows, ceil(columns / 8)). Never both.
    """

    adapter_layer_names = ("peft_mask_scores",)
    other_param_names = ("peft_mask_bits", "peft_mask_positions")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # of a base in evaluation no mask is drawn
        self.peft_mask_scores = nn.ParameterDict()
        self.peft_mask_bits = BitsDict()
        self.peft_mask_positions = BufferDict(persistent=True)
        self._rules: dict[str, Rule] = {}  # of adapters with scores
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._is_merged = False  # what torch.compile may look at: with the names it would compile for each anew
        self._stashes: list[Displaced] = []  # one a merge
        self.keeps_scores = False
        self._fingerprint = UNKNOWN
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    # ---- adapters ----

    def update_layer(self, adapter_name: str, config: MaskConfig, name: str) -> None:
        """Add an adapter: room for packed bits that are to be loaded in inference mode, else starting scores."""
        with onloaded(self):
            weight = self.unmerged_weight()
            self._fingerprint = self._fingerprint_of(weight)
            if config.inference_mode:
                self.peft_mask_bits.wait_for(adapter_name, name)
            else:
                positions = choose_candidates(weight, config, name)
                if positions is not None:
                    self.peft_mask_positions[adapter_name] = positions
                rule = self._rules[adapter_name] = self.rule_for(config, name)
                scores = initial_scores(weight, config, name, positions, rule.unit)
                self.peft_mask_scores[adapter_name] = nn.Parameter(scores.to(getattr(torch, config.scores_dtype)))
                self.set_sparsity(adapter_name, config.target_sparsity)
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_available_adapters(self) -> set[str]:
        return {*self.peft_mask_scores.keys(), *self.peft_mask_bits.keys()}

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that this layer has scores or bits of."""
        return self._get_available_adapters()

    @property
    def stored(self) -> StoredWeight:
        """The base weight as it is stored."""
        return StoredWeight(self.get_base_layer())

    @property
    def in_features(self) -> int:
        """Width of what goes in, by PEFT's name for it."""
        return self.mask_shape[1]

    @property
    def out_features(self) -> int:
        """Width of what comes out, by PEFT's name for it."""
        return self.mask_shape[0]

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

    def has_budget(self, adapter_name: str) -> bool:
        """Return whether the number of weights that an adapter switches off is given."""
        return adapter_name in self._rules and self._rules[adapter_name].budget is not None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # what `to`, `cuda` and the like come down to
        for adapter_name, scores in self.peft_mask_scores.items():
            self._rules[adapter_name] = self.rule(adapter_name).to(scores.device)
        return self

    def positions(self, adapter_name: str) -> torch.Tensor | None:
        """Return the positions of the weights that have a score in an adapter, or None if all have."""
        if adapter_name not in self.peft_mask_positions:
            return None
        return cast(torch.Tensor, self.peft_mask_positions[adapter_name])

    def checked_candidates(self, adapter_name: str, positions: torch.Tensor, name: str) -> torch.Tensor:
        """Return positions as an adapter's candidates: ascending, as the layer stores them.

        Raises:
            ValueError: if they cannot be its candidates; the message names the module.
        """
        if (current := self.positions(adapter_name)) is None:
            raise ValueError(f"every weight of '{name}' has a score: set candidates in MaskConfig for a choice.")
        return checked_positions(positions, len(current), self.mask_shape.numel(), name).to(current)

    @torch.no_grad()
    def set_candidates(self, adapter_name: str, positions: torch.Tensor) -> None:
        """Give an adapter's scores to the weights at `positions` (see `checked_candidates`), in the same tensors."""
        current, scores = self.peft_mask_positions[adapter_name], self.peft_mask_scores[adapter_name]
        scores.copy_(moved_scores(scores, current, positions))
        current.copy_(positions)

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the base weight; if it is sharded or gone, what it was when it was wrapped."""
        if is_taken_away(self.stored.parameter):
            return self._fingerprint
        return self._fingerprint_of(self.unmerged_weight())

    def _fingerprint_of(self, weight: torch.Tensor) -> Fingerprint:
        if weight.is_meta or type(weight) not in (torch.Tensor, nn.Parameter) or weight.shape.numel() == 0:
            return self._fingerprint
        return fingerprint_of(weight, exact=self.stored.exact)

    def mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask: bool, of the weight's shape, True where the weight is kept."""
        return unpack_bits(self.packed_mask(adapter_name), self.mask_shape)

    def packed_mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask as packed bits, uint8 of shape (rows, ceil(columns / 8)).

        Under FSDP2 and ZeRO-3 the scores are gathered first, for which all processes must call this.

        Raises:
            ValueError: if a score is NaN, which has no mask, or if no mask was loaded.
            RuntimeError: under FSDP1, outside the forward pass.
        """
        if adapter_name in self.peft_mask_bits:
            self.peft_mask_bits.check_filled(adapter_name)
            return self.peft_mask_bits[adapter_name]
        scores = whole(self.peft_mask_scores[adapter_name]).detach()
        if scores.isnan().any():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its scores "
                f"contain {int(scores.isnan().sum())} NaN. Did training diverge? Lower the learning rate."
            )
        return self.rule(adapter_name).packed_mask(scores, self.mask_shape, self.positions(adapter_name))

    def _zero_positions(self, adapter_name: str) -> torch.Tensor:
        """Return where the adapter's mask is off: row-major positions, int32 wherever these reach."""
        bits = self.packed_mask(adapter_name)
        if adapter_name in self.peft_mask_bits:
            return self.peft_mask_bits.zero_positions(adapter_name, self.mask_shape)
        return zero_positions(bits, self.mask_shape)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.peft_mask_bits.close(adapter_name)
        self._rules.pop(adapter_name, None)

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write zeros into the base weight where the mask is off, and keep the displaced values.

        Args:
            safe_merge: check the merged weight for NaN and infinities before anything is written.
            adapter_names: adapters to merge, by default the active ones.

        Raises:
            ValueError: if the scores or, with `safe_merge`, the merged weight are not finite.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self._get_available_adapters():
                continue
            stored = self.stored
            positions = self._zero_positions(adapter_name).to(stored.device, torch.int64)
            if safe_merge and not apply_mask(stored.values(), self.mask(adapter_name)).isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken, or the base "
                    "model is: a weight that is kept is not finite."
                )
            # The stash comes first: whatever interrupts the write, unmerging it restores the weight.
            self._stashes.append((positions, stored.take(positions)))
            stored.switch_off(positions)
            self.merged_adapters.append(adapter_name)
            self._is_merged = True

    def unmerge(self) -> None:
        """Put the displaced values back: the base weight is bit for bit what it was before merging."""
        self.unmerge_to(0)

    def unmerge_to(self, depth: int) -> None:
        """Undo the latest merges until `depth` are left (see `merge_depth`)."""
        while len(self._stashes) > depth:
            self.stored.put(*self._stashes[-1])
            self._stashes.pop()
        del self.merged_adapters[depth:]
        self._is_merged = depth > 0

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return self._is_merged

    @property
    def merge_depth(self) -> int:
        """Number of merges that `unmerge` would undo."""
        return len(self._stashes)

    def unmerged_weight(self) -> torch.Tensor:
        """Return the base weight as it is without merged adapters; a copy only if there are any."""
        return self.stored.values_with(self._stashes[::-1])

    # ---- forward ----

    def _under_bits(self, adapter_names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """Return the weight under those adapters that hold bits, and the names of those that are trained."""
        weight = self.stored.values()
        if weight.is_meta:
            raise RuntimeError(
                "cannot mask a weight on the meta device: load the base model's weights, or let accelerate offload "
                "them."
            )
        trained = []
        for adapter_name in adapter_names:
            if adapter_name in self.peft_mask_scores:
                trained.append(adapter_name)
            elif adapter_name in self.peft_mask_bits:
                weight = apply_mask(weight, self.mask(adapter_name))
        return weight, trained

    def _scores_in_force(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return scores, mask and positions of a trained adapter, as the functions on tensors want to know them."""
        scores, positions = self.peft_mask_scores[adapter_name], self.positions(adapter_name)
        rule = self.rule(adapter_name)
        mask = None
        if positions is not None or not rule.plain:  # else these functions have a fast path
            mask = (rule.mask_in_training if self.training else rule.mask)(scores.detach())
        return rule.estimator(scores), mask, positions

    def masked_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """Return the base weight under the product of these adapters' masks; gradients reach their scores."""
        weight, trained = self._under_bits(adapter_names)
        for adapter_name in trained:
            weight = masked_weight(weight, *self._scores_in_force(adapter_name))
        return weight

    def _forward_under(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what the base layer would with its weight under these adapters."""
        raise NotImplementedError

    def _mixed_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """Forward each row of the batch under its own adapter; rows of one adapter together."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        available = self._get_available_adapters()

        def forward(name: str, rows: torch.Tensor) -> torch.Tensor:
            return self.base_layer(rows) if name == BASE else self._forward_under([name], rows)

        return forward_rows(x, [name if name in available else BASE for name in adapter_names], forward)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            with onloaded(self):
                return self._mixed_forward(adapter_names, *args, **kwargs)
        elif not self.merged and not self._get_available_adapters().isdisjoint(self.active_adapters):
            with onloaded(self):
                return self._forward_under(self.active_adapters, *args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def _get_name(self) -> str:
        return "peft_mask." + super()._get_name()


def onloaded(layer: MaskLayer) -> AbstractContextManager[None]:
    """Return a context in which the base weight of an offloaded layer is there; costs nothing for the others."""
    return onload_layer(layer) if layer.stored.device.type == "meta" else nullcontext()
