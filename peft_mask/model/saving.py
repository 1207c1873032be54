"""Masks of a model -> what `adapter_model.safetensors` holds of them: one record a masked layer.

This stands behind the hook that PEFT has for tuners that save something else than they train.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.format.checksums import checksums_for
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.packing import count_zeros
from peft_mask.format.record import write_record
from peft_mask.layers.diffusers_hooks import check_in_memory
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.beside import own_in
from peft_mask.model.embeddings import is_resized, tidy_embeddings
from peft_mask.model.names import BITS, FOR_TRAINING, POSITIONS, SCORES, layers_of_adapter, module_name, named
from peft_mask.scores.budget import file_bytes
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_sharded, is_taken_away, shape_of


def keep_scores(model: nn.Module, enabled: bool = True) -> None:
    """Decide whether saving the model also writes the scores, as a checkpoint to resume from needs them.

    An adapter to publish holds masks only, which is the default. `MaskCallback` calls this at both ends of training; a
    custom loop calls it before it writes a checkpoint.

    Args:
        model: a model with masked layers.
        enabled: True to write scores from now on, False to write masks only.
    """
    for module in model.modules():
        if isinstance(module, MaskLayer):
            module.keeps_scores = enabled


def records_of_adapter(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor], portable: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors that `adapter_model.safetensors` holds of the masks: one record a masked layer.

    Args:
        model: the model with the masked layers.
        adapter_name: which adapter.
        state_dict: state dict of `model`; scores and bits are read from it, not from layers that may be sharded.
        portable: as in `MaskConfig`.

    Returns:
        `<path>.peft_mask_bits.<adapter>` -> uint8 record, and the scores themselves with their positions if
        `keep_scores` asked for them.

    Raises:
        ValueError: if scores contain NaN or are sharded, or a mask was never loaded; if there is nothing to save from.
    """
    layers = layers_of_adapter(model, adapter_name)
    if not state_dict:
        if layers and _is_to_save():
            raise ValueError(
                f"cannot save the adapter '{adapter_name}': the state dict that was handed over is empty. Under "
                "DeepSpeed ZeRO-3 set stage3_gather_16bit_weights_on_model_save to true (in a configuration of "
                "Accelerate: zero3_save_16bit_model: true)."
            )
        return {}
    check_in_memory(model)
    tensors: dict[str, torch.Tensor] = {}
    dead, inexact = [], []
    for path, layer in layers.items():
        layer.peft_mask_bits.check_filled(adapter_name)
        bits_key, scores_key = f"{path}{BITS}.{adapter_name}", f"{path}{SCORES}.{adapter_name}"
        scores = state_dict.get(scores_key)
        if scores is not None and (
            is_sharded(scores) or scores.numel() < shape_of(layer.peft_mask_scores[adapter_name]).numel()
        ):
            raise ValueError(
                f"cannot save the mask of '{module_name(path)}': its scores are sharded over processes. Use "
                "trainer.save_model(folder), or let all processes call accelerator.get_state_dict(model), and one of "
                "them model.save_pretrained(folder, state_dict=...) with what it returns."
            )
        if scores is not None and scores.isnan().any():
            raise ValueError(
                f"cannot save the mask of '{module_name(path)}': {int(scores.isnan().sum())} of {scores.numel()} "
                "scores are NaN. Did training diverge? Lower the learning rate and train again."
            )
        if scores is None and bits_key not in state_dict:
            missing = scores_key if adapter_name in layer.peft_mask_scores else bits_key
            raise ValueError(
                f"cannot save the mask of '{module_name(path)}': the state dict that was handed over has no "
                f"'{missing}'; it holds names such as '{next(iter(state_dict))}'. Hand over that of the whole model."
            )
        shape = layer.mask_shape
        if scores is None:
            bits = state_dict[bits_key]
        else:
            most = layer.zeros_at_rest(adapter_name)
            bits = layer.rule(adapter_name).packed_mask(scores, shape, layer.positions(adapter_name), most)
        with onloaded(layer):
            base = None if portable else _base_to_code_against(layer)
            tensors[bits_key] = write_record(bits, shape, layer.fingerprint(), base)
        if not portable and base is None:
            inexact.append(module_name(path))
        if count_zeros(bits, shape) == shape.numel():
            dead.append(module_name(path))
        if layer.keeps_scores and scores is not None:
            tensors[scores_key] = scores
            if (positions := layer.positions(adapter_name)) is not None:
                tensors[f"{path}{POSITIONS}.{adapter_name}"] = positions
    if inexact:
        warnings.warn(
            f"the masks of {inexact} are saved as with portable=True: their base weights are not at hand whole, in "
            "float32 or bfloat16, to code against.",
            stacklevel=2,
        )
    if dead:
        warnings.warn(f"every weight of {dead} is switched off, which kills these layers.", stacklevel=2)
    return tensors


def _is_to_save() -> bool:
    """Whether this is the process that gets the whole state dict of a model in parts; the others get an empty one."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def adapter_bytes(model: nn.Module, adapter_name: str, portable: bool = True) -> int:
    """Return the size of `adapter_model.safetensors` with the masks of an adapter and no task head."""
    sizes = {}
    for path, layer in layers_of_adapter(model, adapter_name).items():
        with onloaded(layer):
            base = None if portable else _base_to_code_against(layer)
            sizes[module_name(path)] = len(
                write_record(layer.packed_mask(adapter_name), layer.mask_shape, UNKNOWN, base)
            )
    return file_bytes(sizes)


def _base_to_code_against(layer: MaskLayer) -> torch.Tensor | None:
    """Return the base weight if it is here, whole, and in a dtype that all readers round alike."""
    if layer.stored.exact is False or is_taken_away(layer.stored.parameter):
        return None
    weight = layer.unmerged_weight()
    whole = not weight.is_meta and type(weight) in (torch.Tensor, nn.Parameter)
    return weight if whole and weight.dtype in (torch.float32, torch.bfloat16) else None


def checksums_of(
    model: nn.Module,
    config: MaskConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """Return the checksums of what stands beside an adapter's records, or None if nothing does.

    Args:
        model: the model.
        config: the adapter's configuration.
        adapter_name: which adapter.
        state_dict: PEFT's own copy of the state dict of `model`, from which it adds heads and embeddings to the file.
            Of the embeddings it is left what can be loaded again (see `tidy_embeddings`).
        tensors: records and scores, by name with the adapter's.

    Raises:
        ValueError: if what the adapter trained whole could not be loaded again; the message names it.
    """
    suffix = f".{adapter_name}"
    beside = dict(own_in(model, adapter_name, state_dict))
    whole = tidy_embeddings(model, adapter_name, state_dict)
    if whole and is_resized(model, config):  # else PEFT does not save them, or they are the base's
        beside |= {module_name(name): (tensor, ()) for name, tensor in whole.items()}
    for key, tensor in tensors.items():
        if (name := key.removesuffix(suffix)).endswith(FOR_TRAINING):
            beside[module_name(name)] = tensor, ()
    return checksums_for(named(tensors, BITS + suffix), beside)
