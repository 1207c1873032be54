"""Labels travel with an adapter: how many its task head has, and what they are called."""

from __future__ import annotations

import re
import warnings
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from peft_mask.model.heads import head_modules, new_modules
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.fields import names_given

_OF_LABELS = re.compile(r"For\w*Classification")  # classes of transformers whose head has an output for each label


def labels_of(model: nn.Module, known: dict[int, str] | None) -> dict[int, str] | None:
    """Return the names of a model's labels by their places in the logits, as saving writes them.

    Args:
        model: the model with masks.
        known: what the adapter's configuration says of them so far.

    Returns:
        `known` where that has names that somebody gave, or where the model's are not as many; else the model's. None
        where the model has no labels.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = getattr(getattr(base, "config", None), "id2label", None)
    if not _OF_LABELS.search(type(base).__name__) or not names:
        return known
    if known is not None and (len(known) != len(names) or names_given(known) is not None):
        return known
    return dict(names)


def take_labels(model: nn.Module, config: MaskConfig) -> None:
    """Give a base model the labels of the first adapter that is loaded onto it: their names, and so many outputs.

    A head that was in the base's checkpoint, or whose labels somebody has named, keeps the number that it has. Of an
    adapter that is to be trained another number is warned of.

    Args:
        model: the base model.
        config: of the adapter.
    """
    wanted = config.id2label if config.is_saved else None
    if wanted is None or not isinstance(model, PreTrainedModel) or not _OF_LABELS.search(type(model).__name__):
        return
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return  # there is an adapter, whose labels they are
    own = cast("dict[int, str]", model.config.id2label)
    if len(own) != len(wanted):
        name = _output_layer(model)
        if name is None or names_given(own) is not None or not _is_new(model, name):
            return  # loading the head says what does not fit
        _set_outputs(model, name, len(wanted))
        if not config.inference_mode:  # the adapter is trained on, or a new task takes its settings: nobody says which
            warnings.warn(
                f"the model had {len(own)} labels and has {len(wanted)} now, those of the adapter. For a new task take "
                "a new MaskConfig, or set id2label of this one to None.",
                stacklevel=2,
            )
    elif config.label_names is None:
        return
    elif names_given(own) is not None and own != wanted:
        place = next(place for place in wanted if own.get(place) != wanted[place])
        warnings.warn(
            f"the adapter calls label {place} {wanted[place]!r}, this model {own.get(place)!r}: the logits are the "
            "adapter's, and model.config.id2label has its names now.",
            stacklevel=2,
        )
    model.config.id2label = dict(wanted)
    model.config.label2id = {label: place for place, label in wanted.items()}


def _output_layer(model: PreTrainedModel) -> str | None:
    """Return the name of the last linear layer of the head that has an output for each label."""
    heads = tuple(f"{name}." for name in head_modules(model))
    fitting = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.".startswith(heads)
        and module.out_features == model.config.num_labels
    ]
    return fitting[-1] if fitting else None


def _is_new(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer was not in the model's checkpoint, as far as can be told."""
    new = new_modules(model)
    return new is None or any(f"{name}.".startswith(f"{one}.") for one in new)


def _set_outputs(model: PreTrainedModel, name: str, count: int) -> None:
    """Put a new layer with so many outputs in the place of one, started as the model starts its own."""
    old = model.get_submodule(name)
    weight = cast(nn.Parameter, old.weight)
    layer = nn.Linear(
        weight.shape[1], count, bias=old.bias is not None, device=weight.device, dtype=weight.dtype
    ).train(old.training)
    with torch.no_grad():
        model._init_weights(layer)
    model.set_submodule(name, layer)
    model.config.num_labels = count
    if hasattr(model, "num_labels"):
        model.num_labels = count
