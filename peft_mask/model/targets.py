"""Which weights of a model are masked: found, not listed by architecture; and whether they can be."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mask.layers.drawn_head import linear_layers
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.registry import mask_layer_type, stored_weights
from peft_mask.layers.stand_in import ParamWrapper
from peft_mask.model.gates import gate_projections
from peft_mask.model.heads import head_modules, new_modules, output_embeddings, train_new_head
from peft_mask.model.matching import (
    apply_restrictions,
    check_found,
    check_names,
    listed,
    matched_modules,
    matched_parameters,
    outermost_modules,
)
from peft_mask.model.names import plain_name
from peft_mask.scores.units import check_groups, unit_shape
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import GATES
from peft_mask.tensors.aliasing import sharing_memory
from peft_mask.tensors.sharded import has_no_storage, is_flattened, is_sharded, is_taken_away
from peft_mask.tensors.stored import StoredWeight

_WAY_OUT = "Leave it out of target_modules, or name it in exclude_modules."


def resolve_targets(model: nn.Module, config: MaskConfig) -> None:
    """Write into `config` which modules are masked, where it leaves that to us, and that a task head is trained."""
    config.head_names = tuple(head_modules(model))
    if config.structure == "head" and config.head_size is None:
        config.head_size = attention_head_size(model)
    if config.head == "masked":
        if not config.head_names:
            raise ValueError(f'head="masked": {type(model).__name__} has no task head outside its backbone.')
        # PEFT adds the names that heads usually have
        inside = [name for name, _ in model.named_modules() if config.is_in_head(name)]
        config.modules_to_save = [
            name for name in config.modules_to_save or [] if not any(part.endswith(name) for part in inside)
        ]
    else:
        train_new_head(model, config)
    found_here = resolve_default(model, config)
    if isinstance(config.target_modules, (set, list)):
        config.target_modules = {plain_name(name) for name in config.target_modules}
    if not config.is_saved:
        check_names(model, config, found_here)
    apply_restrictions(model, config)
    if found_here:
        leave_out_unmaskable(model, config)
    if config.head == "masked":
        pooler = f"{cast(PreTrainedModel, model).base_model_prefix}.pooler"
        matched = {plain_name(name) for name, _ in matched_modules(model, config)}
        head = linear_layers(model, (*config.head_names, pooler))
        config.target_modules = matched | {plain_name(name) for name in head}
    check_found(model, config)
    matched = {plain_name(name) for name, _ in matched_modules(model, config)}
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in matched):
        # PEFT saves the dense embedding as well if it finds the bare name, or a pattern for it, among the targets
        config.target_modules = matched


def resolve_default(model: nn.Module, config: MaskConfig) -> bool:
    """Write out what the default, `"all-linear"` or `"gate-projections"` means; return whether `config` says such.

    Raises:
        NoMatchingPeftModuleError: if there is none.
    """
    if config.target_modules is None:
        if config.target_parameters and not isinstance(model, PreTrainedModel):
            return False
        config.target_modules = default_target_modules(model)
    elif f"{config.target_modules}".lower() == GATES:
        config.target_modules = gate_projections(model)
    else:
        named = config.target_modules
        _maybe_include_all_linear_layers(config, model)
        if config.target_modules is named:
            return False
    if not config.target_modules and not config.target_parameters:
        raise NoMatchingPeftModuleError(
            f"{type(model).__name__} has no linear layer: name other modules in target_modules, such as convolutions."
        )
    return True


def leave_out_unmaskable(model: nn.Module, config: MaskConfig) -> None:
    """Take out of targets that were found what cannot be masked, and warn of it.

    Raises:
        NoMatchingPeftModuleError: if nothing remains.
    """
    tied = tied_weights(model)
    new = [] if config.is_saved else new_modules(model) or []
    reasons: dict[str, list[str]] = {}
    names, matched = set(), list(matched_modules(model, config))
    if not matched:
        return
    for name, module in matched:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        reason = _reason_by_type(base) or _reason_in_place(model, name, base, tied, config.mask_biases)
        if reason is None and any(f"{name}.".startswith(f"{one}.") for one in new):
            continue  # `train_new_head` has said so
        if reason is None:
            names.add(plain_name(name))
        else:
            reasons.setdefault(reason, []).append(name)
    config.target_modules = names
    if not reasons:
        return
    said = f"linear layers of {type(model).__name__} that are not masked: " + "; ".join(
        f"{listed(left_out, 3)}, since {reason}" for reason, left_out in list(reasons.items())[:3]
    )
    if (more := sum(map(len, list(reasons.values())[3:]))) > 0:
        said += f"; and {more} more for reasons like these"
    if not names and not config.target_parameters:
        raise NoMatchingPeftModuleError(f"there is nothing to mask: {said}.")
    warnings.warn(f"{said}. exclude_modules leaves them out without this line.", stacklevel=2)


def checked_shapes(model: nn.Module, config: MaskConfig) -> dict[str, torch.Size]:
    """Return the shapes of the weights that `config` masks, by the names of their masks.

    Raises:
        ValueError: if one could not be masked, or would be masked without effect; the message names the module.
    """
    tied = tied_weights(model)
    shapes = {}
    for name, module in matched_modules(model, config):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _check_free(name, module)
        if reason := _reason_by_type(base):
            raise ValueError(
                f"Target module '{name}' of type {type(base).__name__} is not supported: {reason}. {_WAY_OUT}"
            )
        if reason := _reason_in_place(model, name, base, tied, config.mask_biases):
            raise ValueError(f"cannot mask '{name}': {reason}. {_WAY_OUT}")
        if isinstance(base, nn.MultiheadAttention):
            _check_here(name, base)
        dimension = mask_layer_type(base).input_dimension_of(base)
        for part, stored in stored_weights(base, name, config.mask_biases).items():
            if stored.reason_not_kept:  # a bias: of weights this is known by now
                raise ValueError(f"cannot mask '{part}': {stored.reason_not_kept}.")
            _check_in_one_piece(part, stored)
            shapes[part] = stored.shape
            _check_units(part, stored.shape, dimension, config)
    for name, module, parameter_name in matched_parameters(model, config):
        if name in shapes or _is_masked_whole(module):
            raise ValueError(
                f"cannot mask the parameter '{parameter_name}' of '{name}': target_modules masks that module "
                "already. Name it in one of target_modules and target_parameters."
            )
        _check_free(name, module)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _check_here(name, base)
        stored = StoredWeight(base, parameter_name)
        if len(stored.shape) < 2 or not stored.parameter.is_floating_point():
            raise ValueError(
                f"cannot mask the parameter '{parameter_name}' of '{name}': expected a floating tensor of at least "
                f"two dimensions, got {stored.parameter.dtype} of shape {tuple(stored.shape)}. Leave it out of "
                "target_parameters."
            )
        _check_in_one_piece(f"{name}.{parameter_name}", stored)
        shapes[f"{name}.{parameter_name}"] = stored.shape
        _check_units(f"{name}.{parameter_name}", stored.shape, None, config)
    return shapes


def _reason_by_type(base: nn.Module) -> str | None:
    """Return why modules like this one cannot be masked, or None."""
    try:
        mask_layer_type(base)
    except ValueError as error:
        return str(error)
    return None


def _reason_in_place(
    model: nn.Module, name: str, base: nn.Module, tied: Mapping[nn.Parameter, set[str]], biases: bool
) -> str | None:
    """Return why a module cannot be masked where it stands, or None."""
    if _is_rescaled(model, name):
        return (
            "RWKV rescales its weight in place in evaluation, which would not reach it (rescale_every=0 in the "
            "configuration of the model keeps it from that)"
        )
    for stored in stored_weights(base, name, biases).values():
        if others := sorted(tied.get(cast(nn.Parameter, stored.parameter), set()) - {name}):
            return (
                f"its weight is tied to {listed([repr(other) for other in others], 3)}, which would see it unmasked "
                "until merging and masked afterwards"
            )
    return None


def _check_units(name: str, shape: torch.Size, dimension: int | None, config: MaskConfig) -> None:
    try:
        unit_shape(shape, config.structure, dimension, config.head_size)
        if config.group is not None:
            check_groups(shape, dimension, config.group[1])
    except ValueError as error:
        field = f"structure={config.structure!r}" if config.group is None else f"pattern={config.pattern!r}"
        raise ValueError(
            f"cannot mask '{name}' with {field}: {error}. Leave it out of target_modules, or choose another."
        ) from error


def _check_free(name: str, module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, MaskLayer):
        raise ValueError(
            f"cannot mask '{name}': it already carries an adapter of type {type(module).__module__}. Masks do not "
            "combine with other methods in one layer; unload that adapter first."
        )


def _check_in_one_piece(name: str, stored: StoredWeight) -> None:
    if is_taken_away(stored.parameter):
        raise ValueError(
            f"cannot mask '{name}': DeepSpeed ZeRO-3 keeps its weight of shape {tuple(stored.shape)} in parts, and "
            "which weights get a score follows from their values. Make the model with its masks before "
            "TrainingArguments or Accelerator; DeepSpeed takes it apart when it prepares it."
        )
    parameter = stored.parameter
    loaded_in_parts = hasattr(stored.module, "_hf_device_mesh")  # by transformers before 5, as plain tensors
    if is_sharded(parameter) or is_flattened(parameter) or has_no_storage(parameter) or loaded_in_parts:
        raise ValueError(
            f"cannot mask '{name}': its weight of shape {tuple(stored.shape)} is sharded over processes, and masks are "
            "made, loaded and checked with all of its values. Add or load the adapter first, and shard the model with "
            "its masks afterwards: fully_shard(get_peft_model(model, config)). Load the base without tp_plan."
        )


def _check_here(name: str, module: nn.Module) -> None:
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ValueError(
            f"cannot mask '{name}': accelerate has offloaded it, and would put the base weight in the place of the "
            "masked one in each forward pass. Keep this module on a device, or leave it out."
        )


def _is_rescaled(model: nn.Module, name: str) -> bool:
    """Whether RWKV halves the weight of a layer in place in evaluation, where a masked layer hands out a copy."""
    return name.endswith((".attention.output", ".feed_forward.value")) and any(
        hasattr(module, "layers_are_rescaled") and cast(PreTrainedModel, module).config.rescale_every > 0
        for module in model.modules()
    )


def _is_masked_whole(module: nn.Module) -> bool:
    return isinstance(module, MaskLayer) and not isinstance(module, ParamWrapper)


def tied_weights(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """Map every parameter that several modules share, or share memory with, to the names of these modules."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(name.removesuffix(".base_layer"))
    for group in sharing_memory(owners):
        names = set().union(*(owners[parameter] for parameter in group))
        owners.update(dict.fromkeys(group, names))
    return {parameter: names for parameter, names in owners.items() if len(names) > 1}


def attention_head_size(model: nn.Module) -> int | None:
    """Return the outputs of an attention head by the configuration of a transformers model; None if it says nothing."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    config = config.get_text_config()
    for name in ("head_dim", "d_kv"):
        if size := getattr(config, name, None):
            return int(size)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width // heads if width and heads else None


def default_target_modules(model: nn.Module) -> set[str]:
    """Return the names of every linear layer of the backbone, as `"all-linear"` but without embeddings and heads.

    Raises:
        ValueError: if `model` is not a transformers model, whose backbone is known.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} is not a transformers model, so "
            'its backbone is not known. `target_modules="all-linear"` masks every linear layer.'
        )
    backbone = "" if model.base_model is model else model.base_model_prefix + "."
    return {
        plain_name(name)
        for name, module in outermost_modules(model)
        if name.startswith(backbone)
        and (base := module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        is not output_embeddings(model)
        and isinstance(base, (nn.Linear, Conv1D))
    }
