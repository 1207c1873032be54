"""State dict <-> records: what a masked model saves, and what it accepts back.

The functions here stand behind PEFT's two hooks for tuners that save something else than they train. They check
everything before they return anything, so that a wrong file changes no weight and no mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from peft_mask.format.checksums import check
from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.packing import count_zeros
from peft_mask.format.ranks import WrongBaseError
from peft_mask.format.record import read_record, write_record
from peft_mask.layers.diffusers_hooks import check_in_memory
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.beside import own_tensors
from peft_mask.model.embeddings import add_rows, bring_in
from peft_mask.model.names import PEFT_PREFIX, module_name, state_name
from peft_mask.model.restored import checked_scores, rebuilt_scores
from peft_mask.scores.budget import file_bytes
from peft_mask.scores.init import restart_margin
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_sharded, is_taken_away, shape_of

BITS, _SCORES, _POSITIONS = ".peft_mask_bits", ".peft_mask_scores", ".peft_mask_positions"
FOR_TRAINING = (_SCORES, _POSITIONS)  # endings of the names of what `keep_scores` adds to a file


def layers_of_adapter(model: nn.Module, adapter_name: str) -> dict[str, MaskLayer]:
    """Return the masked layers of an adapter by their state-dict path in `model`."""
    return {
        state_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and adapter_name in module._get_available_adapters()
    }


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
        bits_key, scores_key = f"{path}{BITS}.{adapter_name}", f"{path}{_SCORES}.{adapter_name}"
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
                tensors[f"{path}{_POSITIONS}.{adapter_name}"] = positions
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
    scores, candidates = named(state_dict, _SCORES), named(state_dict, _POSITIONS)
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
        loaded[f"{path}{_SCORES}.{adapter_name}"] = value.to(parameter.dtype)
        if positions is not None:
            loaded[f"{path}{_POSITIONS}.{adapter_name}"] = positions
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
        checked = config.check_base and not weight.is_meta
        foreign = checked and not record.fingerprint.matches(weight, exact=layer.stored.exact)
        if foreign and count_zeros(record.bits, weight.shape):  # a mask that keeps everything is right for every base
            raise ValueError(
                f"cannot load the mask of '{name}': the base weight is not the one it was trained on (same shape, "
                "other values), so the mask would be meaningless. Load the base model named in the adapter's "
                'adapter_config.json, or, to load it all the same, set "check_base": false there.'
            )
    return record.bits
