"""Embeddings that PEFT saves whole, because the vocabulary was resized: what is written, and how it comes back.

PEFT adds them after the tuner has been asked, and loads them into the base model, for every adapter at once. Here they
come back as a part of their adapter: beside the base's embedding, and never trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig

from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.names import state_name
from peft_mask.settings.config import MaskConfig

_FROZEN = "peft_mask_frozen"  # names of a module's parameters that `bring_in` has made buffers


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that PEFT takes for a model's embeddings, by their state-dict path."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # no model of transformers, or one without tokens
            continue
    named = {id(module): state_name(name) for name, module in model.named_modules()}
    return {named[id(module)]: module for module in found if module is not None and id(module) in named}


def base_tensor(module: nn.Module, attribute: str) -> Tensor | None:
    """Return a tensor of the base model that adapters have wrapped, or None if there is none of that name."""
    while isinstance(module, (AuxiliaryTrainingWrapper, MaskLayer)):
        module = module.get_base_layer() if isinstance(module, MaskLayer) else module.original_module
    return {**module._parameters, **module._buffers}.get(attribute)


# ---- saving ----


def tidy_embeddings(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave in a state dict, of what PEFT may add to a file, each tensor once and under the name it is loaded by.

    PEFT adds whatever stands below an embedding: with a wrapper around it also the base's, which the adapter does
    without, and of a masked one its bits and scores.

    Args:
        model: the model.
        adapter_name: the adapter that is saved.
        state_dict: PEFT's own copy of the model's, without what is of other adapters. It is changed.

    Returns:
        What PEFT may add that is of the base, by name in `state_dict`.
    """
    of_the_base = {}
    for path, module in embeddings_of(model).items():
        for key in [key for key in state_dict if key.startswith(f"{path}.")]:
            name: str | None = key
            rest = key.removeprefix(f"{path}.")
            if isinstance(module, MaskLayer):
                name = key if rest.startswith("base_layer.") else None  # records and scores are added already
            elif isinstance(module, ModulesToSaveWrapper) and rest.startswith("original_module."):
                own = adapter_name in module.modules_to_save
                name = None if own else f"{path}.{rest.removeprefix('original_module.')}"
            if isinstance(module, AuxiliaryTrainingWrapper) and name == key and "base_layer." not in rest:
                continue  # the adapter's own
            tensor = state_dict.pop(key)
            if name is not None:
                of_the_base[name] = state_dict[name] = tensor
    return of_the_base


def is_resized(model: nn.Module, config: MaskConfig) -> bool:
    """Whether the model is known to have another vocabulary than the base it was loaded from, so that PEFT saves it."""
    current, name = getattr(model, "config", None), config.base_model_name_or_path
    vocabulary = getattr(current, "vocab_size", None)
    if not vocabulary or not name or not isinstance(current, PretrainedConfig):
        return False
    try:
        saved: Any = type(current).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # not at hand
        return False
    return bool(saved.vocab_size != vocabulary)


# ---- loading ----


def fits(module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    """Whether a tensor can be that of an adapter's own embedding in the place of the base's."""
    present = base_tensor(module, attribute)
    whole = not isinstance(module, (MaskLayer, TrainableTokensWrapper))
    return whole and present is not None and present.shape == tensor.shape


def other_rows(wrapper: TrainableTokensWrapper, adapter_name: str, tensor: Tensor) -> dict[int, Tensor]:
    """Return those rows of a whole embedding that are not the base's, without the tokens that an adapter trained."""
    base = wrapper.original_module.weight
    differ = set((tensor.to(base) != base).any(1).nonzero().flatten().tolist())
    return {row: tensor[row] for row in sorted(differ - set(wrapper.token_adapter.token_indices[adapter_name]))}


def add_rows(
    model: nn.Module,
    adapter_name: str,
    config: MaskConfig,
    rows: Mapping[str, Mapping[int, Tensor]],
    tensors: dict[str, Tensor],
) -> None:
    """Let an adapter for use bring rows of embeddings beside the tokens that it trained.

    Args:
        model: the model.
        adapter_name: which adapter.
        config: its configuration, which then names these tokens as well.
        rows: path of an embedding -> token -> row.
        tensors: what is about to be loaded, which gets the rows.
    """
    modules = embeddings_of(model)
    for path, added in rows.items():
        layer: Any = modules[path].token_adapter
        key = f"{path}.token_adapter.trainable_tokens_delta.{adapter_name}"
        tensors[key] = torch.cat([tensors[key], torch.stack(list(added.values())).to(tensors[key])])
        delta, original = layer.trainable_tokens_delta[adapter_name], layer.trainable_tokens_original[adapter_name]
        grown = delta.new_empty(len(tensors[key]), delta.shape[1])
        layer.trainable_tokens_delta[adapter_name] = nn.Parameter(grown, requires_grad=False)
        current = layer.base_layer.weight[list(added)].detach().to(original)
        layer.trainable_tokens_original[adapter_name] = torch.cat([original, current])
        layer.token_indices[adapter_name] = tokens = [*layer.token_indices[adapter_name], *added]
        if isinstance(named := config.trainable_token_indices, dict):
            ours = [other for other, module in modules.items() if _indices(module, adapter_name) is tokens]
            named = {
                name: tokens if any(f".{other}".endswith(f".{name}") for other in ours) else old
                for name, old in named.items()
            }
        config.trainable_token_indices = named if isinstance(named, dict) else tokens


def _indices(module: nn.Module, adapter_name: str) -> list[int] | None:
    """Return the tokens that an adapter trains in an embedding, which are those of the embedding it is tied to."""
    layer: Any = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
    return None if layer is None else layer.token_indices.get(adapter_name)


def bring_in(model: nn.Module, adapter_name: str, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give an adapter embeddings of its own, as PEFT does for `modules_to_save`, but to be kept as they are.

    Their tensors are buffers, which nobody trains; those that are one tensor in the base are one here.

    Args:
        model: the model.
        adapter_name: which adapter.
        embeddings: path of an embedding -> name of a tensor in it -> value.
    """
    modules, tied = embeddings_of(model), dict[int, Tensor]()
    active = any(isinstance(module, MaskLayer) and adapter_name in module.active_adapters for module in model.modules())
    for path, values in embeddings.items():
        module = modules[path]
        if isinstance(module, ModulesToSaveWrapper):
            wrapper = module
            wrapper.update(adapter_name)
        else:
            wrapper = ModulesToSaveWrapper(module, adapter_name)
            wrapper.set_adapter([])
            parent, _, name = next(n for n, m in model.named_modules() if m is module).rpartition(".")
            setattr(model.get_submodule(parent), name, wrapper)
        own = wrapper.modules_to_save[adapter_name]
        frozen = {name: parameter for name, parameter in own._parameters.items() if parameter is not None}
        for attribute, parameter in frozen.items():
            source = base_tensor(module, attribute)
            value = values.get(attribute, parameter).to(parameter.device, parameter.dtype).detach().clone()
            if (other := tied.setdefault(id(source), value)) is not value and torch.equal(other, value):
                value = other
            del own._parameters[attribute]
            own.register_buffer(attribute, value)
        setattr(own, _FROZEN, list(frozen))
        if active:
            wrapper.set_adapter(adapter_name, inference_mode=True)


def thaw(model: nn.Module) -> None:
    """Make parameters again what `bring_in` has made buffers, in a model that is no longer wrapped."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name in module.__dict__.pop(_FROZEN, ()):
            value = module._buffers.pop(name)
            assert value is not None
            module.register_parameter(name, made.setdefault(id(value), nn.Parameter(value, requires_grad=False)))
