"""The reference of preference and reinforcement learning: TRL's copy of the adapter that it goes on training.

TRL adds an adapter `"ref"` with the configuration of `"default"`, and copies the parameters that have `.default.` in
their names. A mask is more than its scores: which weights they are of, and how many of these may go. So the copy is
made here, and holds bits: a reference is not trained, and of a binarizer that draws in training it is the mask itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.embeddings import bring_in, embeddings_of
from peft_mask.settings.config import MaskConfig

REFERENCE, _REFERRED = "ref", "default"


def is_reference(adapter_name: str, configs: Mapping[str, MaskConfig]) -> bool:
    """Return whether an adapter is TRL's reference: by its name, and by the very configuration of `"default"`."""
    return adapter_name == REFERENCE and configs.get(REFERENCE) is configs.get(_REFERRED)


def reference_config(configs: Mapping[str, MaskConfig]) -> MaskConfig:
    """Return the configuration of the reference: its own, so that no budget of the trained one reaches it."""
    config = copy.copy(configs[_REFERRED])
    config.inference_mode = True
    return config


def masks_to_refer_to(model: nn.Module) -> dict[MaskLayer, torch.Tensor]:
    """Return the packed masks of `"default"` as they are now, by layer.

    Raises:
        ValueError: if one was never loaded, or a score is NaN.
    """
    return {
        layer: layer.packed_mask(_REFERRED).clone()
        for layer in model.modules()
        if isinstance(layer, MaskLayer) and _REFERRED in layer.available_adapters
    }


def fill_reference(model: nn.Module, masks: Mapping[MaskLayer, torch.Tensor]) -> None:
    """Give the reference these masks, and a copy of what else `"default"` has trained: heads and token embeddings."""
    for layer, bits in masks.items():
        layer.peft_mask_bits.fill(REFERENCE, bits)
    copy_beside(model, _REFERRED, REFERENCE)


@torch.no_grad()
def copy_beside(model: nn.Module, source: str, target: str) -> None:
    """Copy what an adapter has beside its masks to another one: heads, token embeddings, a resized vocabulary."""
    whole: dict[str, Any] = {
        path: module.modules_to_save
        for path, module in embeddings_of(model).items()
        if isinstance(module, ModulesToSaveWrapper)
    }
    brought = {
        path: dict(own[source].state_dict()) for path, own in whole.items() if source in own and target not in own
    }
    bring_in(model, target, brought)  # together, so that tied ones stay one tensor
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict()
            theirs, ours = (module.adapter_state_dict_load_map(name) for name in (source, target))
            for name in theirs.keys() & ours.keys():
                if theirs[name] in state and ours[name] in state:
                    state[ours[name]].copy_(state[theirs[name]])
