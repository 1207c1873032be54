"""Which weights of a model are masked, and which modules are its task head: found, not listed by architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mask.layers.head import linear_layers
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.registry import mask_layer_type, stored_weights
from peft_mask.layers.stand_in import ParamWrapper
from peft_mask.model.names import plain_name
from peft_mask.scores.units import check_groups, unit_shape
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import TASKS_WITH_HEAD
from peft_mask.tensors.memory import sharing_memory
from peft_mask.tensors.sharded import has_no_storage, is_flattened, is_sharded, is_taken_away
from peft_mask.tensors.stored import StoredWeight


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
    elif config.task_type in TASKS_WITH_HEAD or is_multiple_choice(model):
        missing = [name for name in config.head_names if name not in (config.modules_to_save or [])]
        config.modules_to_save = [*(config.modules_to_save or []), *missing]
    if config.target_modules is None and not (config.target_parameters and not isinstance(model, PreTrainedModel)):
        config.target_modules = default_target_modules(model, config)
    _maybe_include_all_linear_layers(config, model)
    if isinstance(config.target_modules, (set, list)):
        config.target_modules = {plain_name(name) for name in config.target_modules}
    matched = {plain_name(name) for name, _ in matched_modules(model, config)}
    if config.head == "masked":
        pooler = f"{cast(PreTrainedModel, model).base_model_prefix}.pooler"
        config.target_modules = matched = matched | linear_layers(model, (*config.head_names, pooler))
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in matched):
        # PEFT saves the dense embedding as well if it finds the bare name, or a pattern for it, among the targets
        config.target_modules = matched


def outermost_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of `model`, a tuner layer as one: not what it wraps."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        yield name, module


def matched_modules(model: nn.Module, config: MaskConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that `config` names to be masked, wrapped or not, with their names."""
    for name, module in outermost_modules(model):
        if name and check_target_module_exists(config, plain_name(name)):
            yield name, module


def matched_parameters(model: nn.Module, config: MaskConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield what `config.target_parameters` names: module name, module, and the parameter's own name."""
    wanted = config.target_parameters or []
    for name, module in outermost_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for parameter_name, _ in base.named_parameters(recurse=False):
            if any(f".{plain_name(name)}.{parameter_name}".endswith(f".{target}") for target in wanted):
                yield name, module, parameter_name


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
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(base, nn.Linear):
            raise ValueError(
                f"cannot mask '{name}': in evaluation nn.TransformerEncoderLayer reads the weights of its linear "
                "layers directly and would ignore the mask. Leave it out of target_modules."
            )
        if isinstance(base, nn.MultiheadAttention):
            _check_here(name, base)
        try:
            dimension = mask_layer_type(base).input_dimension_of(base)
        except ValueError as error:
            raise ValueError(
                f"Target module '{name}' of type {type(base).__name__} is not supported: {error}. Leave it out of "
                "target_modules, or name it in exclude_modules."
            ) from error
        for part, stored in stored_weights(base, name, config.mask_biases).items():
            if others := tied.get(cast(nn.Parameter, stored.parameter), set()) - {name}:
                raise ValueError(
                    f"cannot mask '{name}': its weight is tied to {sorted(others)}, which would see it unmasked "
                    "until merging and masked afterwards. Leave it out of target_modules, or untie the weights "
                    "first."
                )
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


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules with parameters that stand outside the backbone: the task head.

    They are newly initialized when a pretrained backbone is loaded, so they must be trained and saved: the classifier,
    and with it DeBERTa's pooler, DistilBERT's `pre_classifier`, ModernBERT's `head` and so on.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def is_multiple_choice(model: nn.Module) -> bool:
    """Return whether a transformers model chooses one of several texts; PEFT has no task type for such models."""
    return type(model).__name__.endswith("ForMultipleChoice")


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


def default_target_modules(model: nn.Module, config: MaskConfig) -> set[str]:
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
    tied = tied_weights(model)
    output_embeddings = model.get_output_embeddings()
    names = set()
    for name, module in outermost_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if (
            isinstance(base, (nn.Linear, Conv1D))
            and not isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)  # part of an attention layer
            and name.startswith(backbone)
            and base is not output_embeddings
            and base.weight not in tied
        ):
            names.add(plain_name(name))
    if config.layers_to_transform is None:
        return names
    # PEFT looks at layer indices for suffixes only, not for full names.
    suffixes = copy.copy(config)
    suffixes.target_modules = {name.rpartition(".")[2] for name in names}
    return {name for name in names if check_target_module_exists(suffixes, name)}
