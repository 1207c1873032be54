"""Names without what wrappers put into them: those of torch.compile, DDP, FSDP1 and activation checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from peft_mask.layers.mask_layer import MaskLayer

PEFT_PREFIX = "base_model.model."
BITS, SCORES, POSITIONS = ".peft_mask_bits", ".peft_mask_scores", ".peft_mask_positions"
FOR_TRAINING = (SCORES, POSITIONS)  # endings of the names of what `keep_scores` adds to a file
_COMPILED = "_orig_mod"
_HIDDEN = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # such wrappers leave these out of state dicts
_PARALLEL = "module."  # of DDP and DataParallel, in front; a model may call a part of its own so


def state_name(path: str) -> str:
    """Return how `state_dict` names what is at a path of `named_modules`."""
    return ".".join(part for part in path.split(".") if part not in _HIDDEN)


def plain_name(name: str) -> str:
    """Return how a name in a model or a state dict would read if nothing were wrapped: so it stands in files."""
    return ".".join(part for part in name.split(".") if part != _COMPILED and part not in _HIDDEN)


def module_name(name: str) -> str:
    """Return the name of a module in the base model: plain, and without PEFT's prefix."""
    return plain_name(name).removeprefix(PEFT_PREFIX)


def named_as_in(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names that their modules have in the state dict of `model`, whatever wraps either of both.

    A tensor that belongs to no module of it keeps its name.

    Raises:
        ValueError: if two are of one name then.
    """
    paths = {plain_name(path): state_name(path) for path, _ in model.named_modules()}
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        owner, _, attribute = plain_name(key).rpartition(".")
        while owner not in paths and owner.startswith(_PARALLEL):
            owner = owner.removeprefix(_PARALLEL)
        name = f"{paths[owner]}.{attribute}".removeprefix(".") if owner in paths else key
        if name in named:
            raise ValueError(f"'{plain_name(name)}' is there twice, once as '{key}': keep one of the two.")
        named[name] = tensor
    return named


def compiled_in_place(model: nn.Module) -> nn.Module:
    """Take torch.compile's wrappers out of a model: what they held is compiled in place, as `module.compile()` does it.

    Wrapped modules have other names, by which neither PEFT nor transformers finds what an adapter's file brings.

    Returns:
        The model; if it is a wrapper itself, what it held.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_compiled(child) and name != _COMPILED:
                setattr(module, name, _in_place(child))
    return _in_place(model) if _is_compiled(model) else model


def _is_compiled(module: nn.Module) -> bool:
    return _COMPILED in module._modules and hasattr(module, "dynamo_ctx")


def _in_place(wrapper: nn.Module) -> nn.Module:
    module = cast(nn.Module, wrapper._modules[_COMPILED])
    cast(Any, module)._compiled_call_impl = cast(Any, wrapper).dynamo_ctx(module._call_impl)
    return module


def named(state_dict: Mapping[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names end in `suffix`, by the name of their module in the base model.

    Raises:
        ValueError: if two are of one module, with PEFT's prefix and without it.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(suffix):
            name = module_name(key.removesuffix(suffix))
            if name in found:
                raise ValueError(f"the file holds '{name}{suffix}' twice, with the prefix '{PEFT_PREFIX}' and without.")
            found[name] = value
    return found


def layers_of_adapter(model: nn.Module, adapter_name: str) -> dict[str, MaskLayer]:
    """Return the masked layers of an adapter by their state-dict path in `model`."""
    return {
        state_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and adapter_name in module._get_available_adapters()
    }
