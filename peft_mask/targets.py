"""Which modules of a model are masked, and which stand outside the backbone: found, not listed by architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mask.config import MaskConfig

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def resolve_targets(model: nn.Module, config: MaskConfig) -> None:
    """Write into `config` which modules are masked, where it leaves that to us, and that a task head is trained."""
    if config.task_type in _TASKS_WITH_HEAD:
        missing = [name for name in head_modules(model) if name not in (config.modules_to_save or [])]
        config.modules_to_save = [*(config.modules_to_save or []), *missing]
    if config.target_modules is None:
        config.target_modules = default_target_modules(model, config)
    _maybe_include_all_linear_layers(config, model)


def outermost_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of `model`, a tuner layer as one: not what it wraps."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        yield name, module


def tied_weights(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """Map every parameter called `weight` that several modules share to the names of these modules."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight, set()).add(name.removesuffix(".base_layer"))
    return {weight: names for weight, names in owners.items() if len(names) > 1}


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
            and name.startswith(backbone)
            and base is not output_embeddings
            and base.weight not in tied
        ):
            names.add(name)
    if config.layers_to_transform is None:
        return names
    # PEFT looks at layer indices for suffixes only, not for full names.
    suffixes = copy.copy(config)
    suffixes.target_modules = {name.rpartition(".")[2] for name in names}
    return {name for name in names if check_target_module_exists(suffixes, name)}
