"""Masks written into the base weight, and what they displaced put back."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_mask.layers.casting import Conversion, keeping_dtype
from peft_mask.layers.known_zeros import KnownZeros
from peft_mask.scores.functional import apply_mask
from peft_mask.tensors.stored import Displaced, StoredWeight


class MergingLayer(nn.Module, BaseTunerLayer):
    """A layer with a stored weight and masks, which can be merged into it: what they displace is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._is_merged = False  # what torch.compile may look at: with the names it would compile for each anew
        self._stashes: list[Displaced] = []  # one a merge
        self.known_zeros = KnownZeros()

    @property
    def stored(self) -> StoredWeight:
        """The base weight as it is stored."""
        return StoredWeight(self.get_base_layer())

    def mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask: bool, of the weight's shape, True where the weight is kept."""
        raise NotImplementedError

    def _zero_positions(self, adapter_name: str) -> torch.Tensor:
        """Return where the adapter's mask is off: row-major positions."""
        raise NotImplementedError

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
            self.known_zeros.drop()
            # The stash comes first: whatever interrupts the write, unmerging it restores the weight.
            self._stashes.append((positions, stored.take(positions)))
            stored.switch_off(positions)
            self.merged_adapters.append(adapter_name)
            self._is_merged = True

    def unmerge(self) -> None:
        """Put the displaced values back: the base weight is bit for bit what it was before merging.

        If the model was cast meanwhile, it is what it would have become without merging.
        """
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

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        self.known_zeros.drop()
        super()._apply(fn, recurse)
        move = keeping_dtype(fn)
        with torch.no_grad():
            self._stashes = [
                # codes of quantized weights are integers, which no cast means
                (move(positions), fn(former) if former.is_floating_point() else move(former))
                for positions, former in self._stashes
            ]
        return self
