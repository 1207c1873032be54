"""`Masks`: the masks of an adapter as a value, without a model: load, save, combine, compare, measure."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.format.combine import CombinationType, check_votes, combined_mask
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.mask_file import PackedMask, config_naming, read_masks, write_masks
from peft_mask.format.packing import unpack_bits


class Masks(Mapping[str, Tensor]):
    """The masks of an adapter: a mapping from module name to mask (bool, of the weight's shape, True = kept).

    A value: nothing changes it, and what it yields are copies. It keeps packed bits, an eighth of the bytes of the
    masks, and unpacks a mask whenever it is asked for one. It holds masks only: what else was trained, such as a
    classification head, is neither loaded nor saved, and a model under saved masks has the head of its base model.

        a & b       kept in both            (the masks of both adapters applied, one after the other)
        a | b       kept in at least one
        a ^ b       kept in exactly one     (where the two differ)
        a - b       off in `a` and not in `b`
        ~a          kept where `a` switches off
        a == b      the same modules with the same masks

    Operands must mask the same modules, with the same shapes, of the same base model.

    Args:
        masks: bool tensors of at least one dimension by module name, as in `model.named_modules()` of the base model.
            Nothing is known of their base weights, so that loading what `save` makes of them checks shapes only.

    Raises:
        ValueError: a mask is not bool, or has no dimension.

    Example:
        >>> import torch
        >>> from peft_mask import Masks
        >>> a = Masks({"layer": torch.tensor([[True, False], [True, True]])})
        >>> b = Masks({"layer": torch.tensor([[True, True], [False, True]])})
        >>> (a & b)["layer"]
        tensor([[ True, False],
                [False,  True]])
        >>> (a & b).sparsity
        0.5
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool or not mask.dim():
                raise ValueError(
                    f"the mask of '{name}' must be a bool tensor of at least one dimension, got {mask.dtype} of shape "
                    f"{tuple(mask.shape)}. Compare scores with their threshold first."
                )
        self._masks = {name: PackedMask.of(mask, UNKNOWN) for name, mask in masks.items()}
        self._config = config_naming(masks)

    @classmethod
    def _of(cls, masks: dict[str, PackedMask], config: dict[str, Any]) -> Masks:
        new = cls.__new__(cls)
        new._masks, new._config = masks, config
        return new

    # ---- files ----

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: nn.Module | None = None) -> Masks:
        """Load the masks of an adapter.

        Args:
            path: the adapter's folder, or its safetensors file.
            base: the base model, in float32 or bfloat16. It is needed for an adapter that was saved with
                `portable=False`, and only checked for the others. Without it, the masks may take 2 GiB in memory,
                whatever the file claims; to load more, 17 billion weights, a base on the meta device is enough.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, is damaged, has no masks, or was made for another base model. The
                message names the file.
        """
        return cls._of(*read_masks(path, base))

    def save(self, path: str | os.PathLike[str], base: nn.Module | None = None) -> None:
        """Write the masks as an adapter that `PeftModel.from_pretrained` loads.

        The folder gets `adapter_model.safetensors`, the same bytes for the same masks, and `adapter_config.json`, as
        loaded or, for masks that come from no file, naming the masked modules in full. Both are first written under
        other names, then renamed: an interrupted save leaves no half file, and a full disk the old two.

        Args:
            path: a folder; made if it does not exist.
            base: the base model, in float32 or bfloat16, to code the masks against, as `portable=False` in `MaskConfig`
                does: a smaller file that needs this base to be read. None for a portable one.

        Raises:
            ValueError: the masks are not for the weights of `base`; nothing is written then.
            OSError: a file cannot be written; both are as they were then.
        """
        write_masks(path, self._masks, self._config, base)

    # ---- a mapping ----

    def __getitem__(self, name: str) -> Tensor:
        mask = self._masks[name]
        return unpack_bits(mask.bits, mask.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} masks of {self.weights:,} weights, sparsity {self.sparsity:.2%})"

    # ---- an algebra ----

    def __and__(self, other: Masks) -> Masks:
        return self._combine(torch.bitwise_and, other)

    def __or__(self, other: Masks) -> Masks:
        return self._combine(torch.bitwise_or, other)

    def __xor__(self, other: Masks) -> Masks:
        return self._combine(torch.bitwise_xor, other)

    def __sub__(self, other: Masks) -> Masks:
        return self | ~other if isinstance(other, Masks) else NotImplemented

    @classmethod
    def combine(
        cls, masks: Sequence[Masks], weights: Sequence[float], combination_type: CombinationType = "intersection"
    ) -> Masks:
        """Combine masks of the same modules by votes, as `MaskModel.add_weighted_adapter` does.

        Args:
            masks: masks of the same modules of one base model.
            weights: how much the vote of each counts; positive.
            combination_type: `"intersection"`, `"union"` or `"majority"` (see `format.combine.combined_mask`).

        Raises:
            ValueError: if they are of different modules or bases, or the votes have no meaning.
        """
        check_votes(masks, weights, combination_type)
        whole = functools.reduce(operator.and_, masks)  # which also sees to it that they belong together
        combined = {}
        for name, one in whole._masks.items():
            mask = combined_mask([each[name] for each in masks], weights, combination_type)
            combined[name] = PackedMask.of(mask, one.fingerprint)
        return cls._of(combined, masks[0]._config)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Masks:
        """Return other masks of the same weights: those that `function` makes of the name and the mask of each.

        Args:
            function: takes a module's name and its mask, and returns a bool tensor of the same shape.

        Raises:
            ValueError: `function` returned something else.
        """
        made = {}
        for name, one in self._masks.items():
            mask = function(name, self[name])
            if mask.dtype != torch.bool or tuple(mask.shape) != one.shape:
                raise ValueError(
                    f"the new mask of '{name}' must be a bool tensor of shape {one.shape}, got {mask.dtype} of shape "
                    f"{tuple(mask.shape)}."
                )
            made[name] = PackedMask.of(mask, one.fingerprint)
        return self._of(made, self._config)

    def __invert__(self) -> Masks:
        return self.map(lambda name, mask: ~mask)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            mask.shape == other._masks[name].shape and torch.equal(mask.bits, other._masks[name].bits)
            for name, mask in self._masks.items()
        )

    def _combine(self, operation: Callable[[Tensor, Tensor], Tensor], other: Masks) -> Masks:
        if not isinstance(other, Masks):
            return NotImplemented
        if self.keys() != other.keys():
            raise ValueError(
                "cannot combine masks of different modules.\n"
                f"  only on the left: {sorted(self.keys() - other.keys()) or 'none'}\n"
                f"  only on the right: {sorted(other.keys() - self.keys()) or 'none'}\n"
                "Were the adapters trained with the same target_modules, on the same base model?"
            )
        combined = {}
        for name, left in self._masks.items():
            right = other._masks[name]
            if left.shape != right.shape:
                raise ValueError(
                    f"cannot combine the masks of '{name}': their shapes are {left.shape} and {right.shape}. "
                    "Are they for different base models?"
                )
            if not left.fingerprint.agrees_with(right.fingerprint):
                raise ValueError(
                    f"cannot combine the masks of '{name}': they were made for different base weights (same shape, "
                    "other values), so that together they mean nothing."
                )
            fingerprint = max(left.fingerprint, right.fingerprint, key=lambda known: known.precision)
            combined[name] = PackedMask(operation(left.bits, right.bits), left.shape, fingerprint)
        return self._of(combined, self._config)

    # ---- measures ----

    @property
    def weights(self) -> int:
        """Number of masked weights, kept or off."""
        return sum(mask.weights for mask in self._masks.values())

    @property
    def zeros(self) -> dict[str, int]:
        """Number of weights that are off in each mask, by module name."""
        return {name: mask.zeros for name, mask in self._masks.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are off; 0 if there are none."""
        return sum(mask.zeros for mask in self._masks.values()) / max(self.weights, 1)

    @property
    def sparsities(self) -> dict[str, float]:
        """`sparsity` of each mask, by module name."""
        return {name: mask.zeros / max(mask.weights, 1) for name, mask in self._masks.items()}

    @property
    def bits_per_weight(self) -> float:
        """Size of the masks in a portable file, in bits a weight: coded, with header and checksum of each mask."""
        return 8 * sum(len(mask.record) for mask in self._masks.values()) / max(self.weights, 1)

    @property
    def entropy(self) -> float:
        """Entropy of the masks in bits a weight, the measure for `bits_per_weight`.

        sum_i n_i H(p_i) / sum_i n_i with H(p) = -p log2 p - (1 - p) log2 (1 - p), where mask i has n_i weights and
        sparsity p_i: what a code needs at least that knows the number of zeros in each mask and nothing of where they
        are. A code that finds more order in a mask may need less.
        """
        return sum(mask.entropy for mask in self._masks.values()) / max(self.weights, 1)
