"""What the analyses look at: the masks of a live model, and the weights that it computes with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_mask.format.mask_file import weight_of
from peft_mask.format.masks import Masks
from peft_mask.model.names import layers_of_adapter


def masks_of(model: nn.Module, adapter_name: str = "default") -> Masks:
    """Return the masks of an adapter of a live model as they are now, as a value: training does not change it.

    Args:
        model: a PEFT model, or one that carries masks by transformers' `add_adapter`.
        adapter_name: which adapter, trained or for inference.

    Returns:
        The masks by module name, as `Masks.load` gives them for the saved adapter, but without the fingerprints of the
        base weights.

    Raises:
        ValueError: if no layer has such an adapter, or it was never loaded.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_mask import MaskConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules=["0"]))
        >>> masks_of(model).sparsity  # before training every weight is kept
        0.0
    """
    layers = layers_of_adapter(base_of(model), adapter_name)
    if not layers:
        raise ValueError(f"the model has no masks of an adapter named '{adapter_name}'.")
    return Masks({name: layer.mask(adapter_name).cpu() for name, layer in layers.items()})


def base_of(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps, whose module names are those of the masks; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of the plain model that computes what `model` does.

    Of a masked model that is W * M where a weight is masked, the base weight elsewhere, and the head that was trained;
    of a model with another adapter of PEFT's the merged weights; of a plain model its own.

    Args:
        model: a PEFT model, which is not changed, or a plain one. A PEFT model is copied whole for a moment.

    Returns:
        Parameters and buffers by their names in the plain model, on its device; of tied ones the first name.

    Source: "W1 = effective weights" of the mode connectivity in Zhao et al. 2020.

    Example:
        >>> sorted(effective_weights(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    plain = copy.deepcopy(model)
    if isinstance(plain, PeftModel):
        plain = plain.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in _tensors(plain).items()}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write tensors such as `effective_weights` returns into a plain model, in place.

    Args:
        model: the model.
        weights: a tensor of the same shape for each of its parameters and buffers.

    Raises:
        ValueError: if names or shapes are others; nothing has changed then.
    """
    own = _tensors(model)
    if own.keys() != weights.keys():
        raise ValueError(
            "cannot write these weights: they are of another model.\n"
            f"  missing: {sorted(own.keys() - weights.keys())[:4] or 'none'}\n"
            f"  not in the model: {sorted(weights.keys() - own.keys())[:4] or 'none'}"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"cannot write '{name}': expected shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)}."
            )
    for name, tensor in own.items():
        tensor.copy_(weights[name])


@torch.no_grad()
def apply_masks(base: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write zeros into the weights of a plain model where masks are off, in place; nothing is kept to undo it.

    For adapters use PEFT: `merge_adapter` can be undone. This is for masks that no training made, such as controls.

    Args:
        base: a plain model.
        masks: bool, True where the weight is kept, by module name.

    Raises:
        ValueError: if a module or its weight is not there, or has another shape; nothing has changed then.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1))
        >>> apply_masks(layer, {"0": torch.tensor([[True, False]])})
        >>> layer[0].weight[0, 1].item()
        0.0
    """
    weights = {name: weight_of(name, base, mask.shape) for name, mask in masks.items()}
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name].to(weight.device), 0.0)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
