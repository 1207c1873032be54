"""A file's tensors -> a state dict of the model: bits for masks in use, scores for those to be trained on.

This stands behind PEFT's other hook. Everything is checked before anything is returned, so that a wrong file changes no
weight and no mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from peft_mask.format.checksums import check
from peft_mask.format.packing import count_zeros
from peft_mask.format.ranks import WrongBaseError
from peft_mask.format.record import read_record
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.beside import own_tensors
from peft_mask.model.embeddings import add_rows, bring_in
from peft_mask.model.names import BITS, FOR_TRAINING, POSITIONS, SCORES, layers_of_adapter, module_name, named
from peft_mask.model.restored import checked_scores, rebuilt_scores
from peft_mask.scores.init import restart_margin
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_sharded


def state_from_records(
    model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Turn a loaded file into a state dict of `model`: bits for adapters in use, scores for those to be trained on.

    Args:
        model: the model, with the adapter's layers in place (their scores may be on the meta device).
        config: the adapter's configuration.
        adapter_name: name of the adapter in `model`.
        state_dict: the file's tensors by name. Those that are not masks pass through.

    Raises:
        ValueError: if the file's masks are not exactly those of the model's masked layers, if one is damaged or of
            another shape, or (`config.check_base`) if it was made for another base weight; if the file holds more than
            is the adapter's (see `own_tensors`). No tensor of the model has changed then.
    """
    layers = {module_name(path): (path, layer) for path, layer in layers_of_adapter(model, adapter_name).items()}
    records = named(state_dict, BITS)
    scores, candidates = named(state_dict, SCORES), named(state_dict, POSITIONS)
    if records.keys() != layers.keys():
        raise ValueError(
            f"cannot load the adapter '{adapter_name}': its file and the model do not mask the same layers.\n"
            f"  masked in the model, not in the file: {sorted(layers.keys() - records.keys()) or 'none'}\n"
            f"  masked in the file, not in the model: {sorted(records.keys() - layers.keys()) or 'none'}\n"
            "Is it an adapter of peft_mask, whole, and for this base model? If saving it over another one was "
            "interrupted, the configuration may still be that of the other: save it again."
        )
    others = {key: tensor for key, tensor in state_dict.items() if not key.endswith((BITS, *FOR_TRAINING))}
    beside = own_tensors(model, adapter_name, config, others)
    rebuilt = False
    restored: dict[
        str, tuple[float | None, int | None]
    ] = {}  # budget of layers with scores, and zeros if these are less
    loaded: dict[str, torch.Tensor] = {}
    for name, (path, layer) in layers.items():
        bits = checked_bits(name, layer, records[name], config)
        if adapter_name in layer.peft_mask_bits:
            loaded[f"{path}{BITS}.{adapter_name}"] = bits
            continue
        parameter, positions = layer.peft_mask_scores[adapter_name], layer.positions(adapter_name)
        if name in scores:
            value, kept = scores[name], candidates.get(name)
            positions, restored[name] = checked_scores(name, layer, adapter_name, config, bits, value, kept)
        else:
            value, positions = rebuilt_scores(name, layer, bits, config, sparse=positions is not None)
            restored[name] = config.target_sparsity, None
            rebuilt = True
        loaded[f"{path}{SCORES}.{adapter_name}"] = value.to(parameter.dtype)
        if positions is not None:
            loaded[f"{path}{POSITIONS}.{adapter_name}"] = layer.as_kept(positions)
    first_load = all(layer.peft_mask_bits.is_open(adapter_name) for _, layer in layers.values())
    if config.checksums is not None and first_load:  # else the configuration is not this file's
        trained = {module_name(key): (state_dict[key], ()) for key in state_dict if key.endswith(FOR_TRAINING)}
        check(config.checksums, records, {**beside.beside, **trained})
    warning = None
    if rebuilt:
        warning = (
            f"the adapter '{adapter_name}' holds masks without scores: every score restarts at init_margin "
            f"({restart_margin(config):g}) above or below the threshold. Training goes on from the mask, but not as if "
            "it had never stopped; for that, train with MaskCallback, which keeps the scores in checkpoints."
        )
        # into scores that were trained already a training may also load its best masks, and end
        if not any(layer.scores_changed(adapter_name) for _, layer in layers.values()):
            warnings.warn(warning, stacklevel=2)
            warning = None
    for name, (path, layer) in layers.items():  # now that all masks are accepted, in place of room for their records
        if (bits_key := f"{path}{BITS}.{adapter_name}") in loaded:
            layer.peft_mask_bits.fill(adapter_name, loaded[bits_key])
            continue
        layer.peft_mask_bits.close(adapter_name)
        sparsity, zeros = restored[name]
        layer.set_sparsity(adapter_name, sparsity)
        layer.rest(adapter_name, zeros, warning)
        warning = None  # once is enough
    for _, layer in layers.values():
        layer.check_when_filled(adapter_name, None)
    bring_in(model, adapter_name, beside.embeddings)
    add_rows(model, adapter_name, config, beside.rows, beside.tensors)
    return beside.tensors | loaded


def checked_bits(name: str, layer: MaskLayer, data: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    """Decode the record of a layer's mask.

    Raises:
        ValueError: if it is damaged, of another shape or (`config.check_base`) for another base weight.
    """
    with onloaded(layer):
        weight = layer.unmerged_weight()
        if is_sharded(weight):
            raise ValueError(
                f"cannot load the mask of '{name}': the base weight is sharded over processes, and a mask is checked "
                "against all of it. Load the adapter first, and shard the model afterwards."
            )
        return bits_for(name, data, weight, exact=layer.stored.exact, check_base=config.check_base)


def bits_for(
    name: str, data: torch.Tensor, weight: torch.Tensor, *, exact: bool | None = None, check_base: bool = True
) -> torch.Tensor:
    """Decode the record of a mask for a base weight.

    Args:
        name: of the module.
        data: the record.
        weight: what the mask is for, whole; on the meta device only its shape is checked.
        exact: as for `fingerprint_of`.
        check_base: as in `MaskConfig`.

    Returns:
        The mask's packed bits.

    Raises:
        ValueError: if it is damaged, of another shape or (`check_base`) for another base weight.
    """
    try:
        record = read_record(data, weight.shape, None if weight.is_meta else weight)
    except WrongBaseError as error:
        advice = ": load the base model's weights before the adapter" if weight.is_meta else ""
        raise WrongBaseError(f"cannot load the mask of '{name}': {error}{advice}.") from error
    except ValueError as error:
        raise ValueError(
            f"cannot load the mask of '{name}': {error}. Was this adapter trained on another base model, or its "
            "file damaged?"
        ) from error
    foreign = check_base and not weight.is_meta and not record.fingerprint.matches(weight, exact=exact)
    if foreign and count_zeros(record.bits, weight.shape):  # a mask that keeps everything is right for every base
        raise ValueError(
            f"cannot load the mask of '{name}': the base weight is not the one it was trained on (same shape, "
            "other values), so the mask would be meaningless. Load the base model named in the adapter's "
            'adapter_config.json, or, to load it all the same, set "check_base": false there.'
        )
    return record.bits
