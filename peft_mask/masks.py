"""`Masks`: the masks of an adapter as a value, without a model: load, save, combine, compare, measure."""

from __future__ import annotations

import functools
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_mask.combine import CombinationType, check_votes, combined_mask
from peft_mask.fingerprint import UNKNOWN, Fingerprint
from peft_mask.packing import count_zeros, entropy_bits, pack_bits, unpack_bits
from peft_mask.record import read_record, write_record

_WEIGHTS_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _SUFFIX = "base_model.model.", ".peft_mask_bits"


@dataclass(frozen=True)
class _Mask:
    bits: Tensor
    shape: tuple[int, ...]
    fingerprint: Fingerprint

    @cached_property
    def weights(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def zeros(self) -> int:
        return count_zeros(self.bits, self.shape)

    @property
    def entropy(self) -> float:
        return entropy_bits(self.zeros, self.weights)

    @cached_property
    def record(self) -> Tensor:
        return write_record(self.bits, self.shape, self.fingerprint)


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
        self._masks = {name: _Mask(pack_bits(mask).cpu(), tuple(mask.shape), UNKNOWN) for name, mask in masks.items()}
        self._config = _config_naming(masks)

    @classmethod
    def _of(cls, masks: dict[str, _Mask], config: dict[str, Any]) -> Masks:
        new = cls.__new__(cls)
        new._masks, new._config = masks, config
        return new

    # ---- files ----

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Load the masks of an adapter.

        Args:
            path: the adapter's folder, or its safetensors file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, is damaged, or has no masks. The message names the file.
        """
        file = Path(path)
        if file.is_dir():
            file /= _WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"no masks at '{path}': '{file}' does not exist. Give the folder that save_pretrained or "
                "Masks.save wrote."
            )
        masks = {name: _read(name, data, file) for name, data in _records(file).items()}
        return cls._of(masks, _read_config(file.with_name(_CONFIG_FILE)) or _config_naming(masks))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as an adapter that `PeftModel.from_pretrained` loads.

        The folder gets `adapter_model.safetensors`, the same bytes for the same masks, and `adapter_config.json`, as
        loaded or, for masks that come from no file, naming the masked modules in full. Each is first written under
        another name, then renamed: an interrupted save leaves no half file.

        Args:
            path: a folder; made if it does not exist.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{_PREFIX}{name}{_SUFFIX}": mask.record for name, mask in self._masks.items()}
        sizes = [len(self._masks[name].record) for name in sorted(self._masks)]  # for transformers, see MaskConfig
        text = json.dumps(self._config | {"record_bytes": sizes}, indent=2, sort_keys=True) + "\n"
        _write(folder / _WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        _write(folder / _CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))

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
            combination_type: `"intersection"`, `"union"` or `"majority"` (see `peft_mask.combine.combined_mask`).

        Raises:
            ValueError: if they are of different modules or bases, or the votes have no meaning.
        """
        check_votes(masks, weights, combination_type)
        whole = functools.reduce(operator.and_, masks)  # which also sees to it that they belong together
        combined = {name: combined_mask([mask[name] for mask in masks], weights, combination_type) for name in whole}
        bits = {
            name: _Mask(pack_bits(combined[name]), mask.shape, mask.fingerprint) for name, mask in whole._masks.items()
        }
        return cls._of(bits, masks[0]._config)

    def __invert__(self) -> Masks:
        inverted = {
            name: _Mask(pack_bits(~self[name]), mask.shape, mask.fingerprint) for name, mask in self._masks.items()
        }
        return self._of(inverted, self._config)

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
            combined[name] = _Mask(operation(left.bits, right.bits), left.shape, fingerprint)
        return self._of(combined, self._config)

    # ---- measures ----

    @property
    def weights(self) -> int:
        """Number of masked weights, kept or off."""
        return sum(mask.weights for mask in self._masks.values())

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
        """Size of the masks in the file, in bits a weight: coded, with header and checksum of each mask."""
        return 8 * sum(len(mask.record) for mask in self._masks.values()) / max(self.weights, 1)

    @property
    def entropy(self) -> float:
        """Entropy of the masks in bits a weight, the measure for `bits_per_weight`.

        sum_i n_i H(p_i) / sum_i n_i with H(p) = -p log2 p - (1 - p) log2 (1 - p), where mask i has n_i weights and
        sparsity p_i: what a code needs at least that knows the number of zeros in each mask and nothing of where they
        are. A code that finds more order in a mask may need less.
        """
        return sum(mask.entropy for mask in self._masks.values()) / max(self.weights, 1)


def _records(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            records = {
                key.removesuffix(_SUFFIX).removeprefix(_PREFIX): tensors.get_tensor(key)
                for key in keys
                if key.endswith(_SUFFIX)
            }
    except SafetensorError as error:
        raise ValueError(
            f"cannot load masks from '{file}': it is not a whole safetensors file ({error}). Download or save it again."
        ) from error
    if not records:
        raise ValueError(
            f"cannot load masks from '{file}': no tensor in it ends in '{_SUFFIX}' (it has {keys[:3]} and so on). "
            "Is it the adapter of another method?"
        )
    return records


def _read(name: str, data: Tensor, file: Path) -> _Mask:
    try:
        record = read_record(data)
    except ValueError as error:
        raise ValueError(
            f"cannot load the mask of '{name}' from '{file}': {error}. If an upgrade of peft_mask does not help, "
            "download or save the file again."
        ) from error
    return _Mask(record.bits, record.shape, record.fingerprint)


def _read_config(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot load masks: '{file}' is not JSON ({error}). Download or save it again.") from error
    if config.get("modules_to_save"):
        # Heads are not masks and will not be saved. With a task type, PEFT and MaskModel would still ask for them.
        config |= {"modules_to_save": None, "task_type": None}
    return config


def _config_naming(modules: Iterable[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "PEFT_MASK",
        "target_modules": sorted(modules),
        "task_type": None,
    }


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    try:
        write(unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
