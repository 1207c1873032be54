"""An adapter's folder <-> its packed masks: `adapter_model.safetensors`, and the configuration beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn

from peft_mask.format.atomic import replace_files
from peft_mask.format.fingerprint import Fingerprint
from peft_mask.format.packing import bits_shape, count_zeros, entropy_bits, pack_bits
from peft_mask.format.ranks import WrongBaseError
from peft_mask.format.record import MAX_BYTES, Header, read_header, read_record, write_record

BIAS = ".bias_mask"  # what the name of a bias' mask has behind that of the module
_WEIGHTS_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_ADVICE = "If an upgrade of peft_mask does not help, download or save the file again."
_PREFIX, _SUFFIX = "base_model.model.", ".peft_mask_bits"


@dataclass(frozen=True)
class PackedMask:
    """A mask as packed bits, with what is known of the weight it is for."""

    bits: Tensor
    shape: tuple[int, ...]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, mask: Tensor, fingerprint: Fingerprint) -> PackedMask:
        """Pack a mask, a bool tensor."""
        return cls(pack_bits(mask).cpu(), tuple(mask.shape), fingerprint)

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


def read_masks(
    path: str | os.PathLike[str], base: nn.Module | None = None
) -> tuple[dict[str, PackedMask], dict[str, Any]]:
    """Read the masks of an adapter, by module name, and its configuration; see `Masks.load`."""
    file = Path(path)
    if file.is_dir():
        file /= _WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no masks at '{path}': '{file}' does not exist. Give the folder that save_pretrained or Masks.save wrote."
        )
    records = _records(file)
    if base is None:
        _check_claims(records, file)
    masks = {}
    for name, data in records.items():
        weight = weight_of(name, base).detach() if base is not None else None
        mask = masks[name] = _read(name, data, file, weight)
        if weight is not None and not weight.is_meta:
            _check_fingerprint(name, mask, weight)
    beside = file.with_name(_CONFIG_FILE)
    config = (read_config(beside) if beside.is_file() else {}) or config_naming(masks)
    if config.get("modules_to_save"):
        # Heads are not masks and will not be saved. With a task type, PEFT and MaskModel would still ask for them.
        config |= {"modules_to_save": None, "task_type": None, "id2label": None}
    if config.get("trainable_token_indices"):
        config |= {"trainable_token_indices": None}
    return masks, config


def write_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, PackedMask],
    config: Mapping[str, Any],
    base: nn.Module | None = None,
) -> None:
    """Write masks and configuration as an adapter; see `Masks.save`."""
    records = {name: mask.record if base is None else _coded_against(name, mask, base) for name, mask in masks.items()}
    portable = {} if config.get("portable", True) == (base is None) else {"portable": base is None}
    sizes = [len(records[name]) for name in sorted(records)]  # transformers' own door asks for them
    said = {name: value for name, value in config.items() if name != "checksums"}  # of what is not in this file
    text = json.dumps({**said, **portable, "record_bytes": sizes}, indent=2, sort_keys=True) + "\n"
    tensors = {f"{_PREFIX}{name}{_SUFFIX}": record for name, record in records.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    data = serialized(tensors, metadata={"format": "pt"})
    replace_files({folder / _WEIGHTS_FILE: data, folder / _CONFIG_FILE: text.encode()})


def _records(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            names = {key: key.removesuffix(_SUFFIX).removeprefix(_PREFIX) for key in keys if key.endswith(_SUFFIX)}
            records = {name: tensors.get_tensor(key) for key, name in names.items()}
    except SafetensorError as error:
        raise ValueError(
            f"cannot load masks from '{file}': it is not a whole safetensors file ({error}). Download or save it again."
        ) from error
    if len(records) < len(names):
        raise ValueError(
            f"cannot load masks from '{file}': it holds a mask twice, with the prefix '{_PREFIX}' and without."
        )
    if not records:
        raise ValueError(
            f"cannot load masks from '{file}': no tensor in it ends in '{_SUFFIX}' (it has {keys[:3]} and so on). "
            "Is it the adapter of another method?"
        )
    return records


def _read(name: str, data: Tensor, file: Path, weight: Tensor | None) -> PackedMask:
    known = weight is not None and not weight.is_meta
    try:
        record = read_record(data, None if weight is None else weight.shape, weight if known else None)
    except WrongBaseError as error:
        advice = "" if known else ": pass the base model, in float32 or bfloat16, as Masks.load(path, base=model)"
        raise WrongBaseError(f"cannot load the mask of '{name}' from '{file}': {error}{advice}.") from error
    except ValueError as error:
        raise ValueError(f"cannot load the mask of '{name}' from '{file}': {error}. {_ADVICE}") from error
    return PackedMask(record.bits, record.shape, record.fingerprint)


def read_headers(file: Path) -> dict[str, tuple[Header, int]]:
    """Read what a file says of its masks without the masks, which may be coded against a base.

    Returns:
        By module name, the header of the mask and the bytes of its record.

    Raises:
        ValueError: the file is damaged, or has no masks. The message names it.
    """
    return {name: (_header(name, data, file), len(data)) for name, data in _records(file).items()}


def _header(name: str, data: Tensor, file: Path) -> Header:
    try:
        return read_header(data)
    except ValueError as error:
        raise ValueError(f"cannot load the mask of '{name}' from '{file}': {error}. {_ADVICE}") from error


def _check_claims(records: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a file whose masks would take more than 2 GiB: a record of sixty bytes may claim any number of weights."""
    shapes = [_header(name, data, file).shape for name, data in records.items()]
    claimed = sum(math.prod(bits_shape([max(size, 1) for size in shape])) for shape in shapes)
    if claimed > MAX_BYTES:
        raise ValueError(
            f"cannot load masks from '{file}': it claims {claimed:,} bytes of bits, which is too large to be believed "
            "without the base model. Pass it, on the meta device is enough: Masks.load(path, base=model)."
        )


def weight_of(name: str, base: nn.Module, shape: Sequence[int] | None = None) -> Tensor:
    """Return the weight of a model without adapters that the mask of this name is for.

    Args:
        name: of the mask.
        base: the model.
        shape: of the mask; None if the weight may have any.

    Raises:
        ValueError: there is no such weight, it has another shape or is quantized, or the file does not say which it is;
            the message names it.
    """
    owner = name.removesuffix(BIAS)
    try:
        module = base.get_submodule(owner.replace(".base_layer", ""))  # a mask inside another module's wrapper
    except AttributeError:
        raise ValueError(
            f"the base model, a {type(base).__name__}, has no module '{name}': give the model that the masks are for, "
            "of the class it was trained as, without adapters."
        ) from None
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"the base model carries an adapter at '{name}', whose weights may be changed: give it without."
        )
    parameter = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = getattr(module, parameter if owner == name else "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"'{name}' masks a parameter of {type(module).__name__} whose name its file does not say: leave the base "
            "model out or, if the file needs it, load it with PeftModel.from_pretrained and save it with portable=True."
        )
    if not weight.is_floating_point():
        raise ValueError(f"the base weight of '{name}' is quantized: give the base model in float32 or bfloat16.")
    if shape is not None and weight.shape != torch.Size(shape):
        raise ValueError(
            f"the mask of '{name}' is for a weight of shape {tuple(shape)}, the base model's is {tuple(weight.shape)}."
        )
    return weight


def _coded_against(name: str, mask: PackedMask, base: nn.Module) -> Tensor:
    weight = weight_of(name, base, mask.shape).detach()
    if weight.is_meta:
        raise ValueError(f"the base weight of '{name}' has no values: load the base model's weights first.")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"cannot code the mask of '{name}' against a weight in {weight.dtype}, which readers may have rounded "
            "otherwise: load the base model in float32 or bfloat16, or save without it."
        )
    _check_fingerprint(name, mask, weight)
    return write_record(mask.bits, mask.shape, mask.fingerprint, weight)


def _check_fingerprint(name: str, mask: PackedMask, weight: Tensor) -> None:
    if mask.zeros and not mask.fingerprint.matches(weight):
        raise ValueError(
            f"the mask of '{name}' was not made for the weight of the base model given (same shape, other values)."
        )


def read_config(file: Path) -> dict[str, Any]:
    """Read an adapter's configuration, as it stands in its file.

    Raises:
        ValueError: it is no JSON object. The message names the file.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {str(config)[:20]}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot load masks: '{file}' is not JSON ({error}). Download or save it again.") from error
    return config


def config_naming(modules: Iterable[str]) -> dict[str, Any]:
    """Return what `adapter_config.json` says of masks that come from no file."""
    names = set(modules)
    weights = {name for name in names if not name.endswith(BIAS)}
    return {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "PEFT_MASK",
        "target_modules": sorted(weights),
        "task_type": None,
    } | ({"mask_biases": True} if weights < names else {})
