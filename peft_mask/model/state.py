"""State dict <-> records: what a masked model saves, and what it accepts back.

The functions here stand behind PEFT's two hooks for tuners that save something else than they train. They check
everything before they return anything, so that a wrong file changes no weight and no mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from peft_mask.format.fingerprint import UNKNOWN
from peft_mask.format.packing import count_zeros, unpack_bits
from peft_mask.format.ranks import WrongBaseError
from peft_mask.format.record import read_record, write_record
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.beside import FSDP_PREFIX, PEFT_PREFIX, own_tensors
from peft_mask.scores.budget import file_bytes
from peft_mask.scores.candidates import choose_candidates
from peft_mask.scores.functional import per_weight
from peft_mask.scores.init import restart_margin
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_sharded, is_taken_away, shape_of

BITS, _SCORES, _POSITIONS = ".peft_mask_bits", ".peft_mask_scores", ".peft_mask_positions"
FOR_TRAINING = (_SCORES, _POSITIONS)  # endings of the names of what `keep_scores` adds to a file


def layers_of_adapter(model: nn.Module, adapter_name: str) -> dict[str, MaskLayer]:
    """Return the masked layers of an adapter by their state-dict path in `model`."""
    return {
        name.replace(FSDP_PREFIX, ""): module
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
                f"cannot save the mask of '{_module_name(path)}': its scores are sharded over processes. Use "
                "trainer.save_model(folder), or let all processes call accelerator.get_state_dict(model), and one of "
                "them model.save_pretrained(folder, state_dict=...) with what it returns."
            )
        if scores is not None and scores.isnan().any():
            raise ValueError(
                f"cannot save the mask of '{_module_name(path)}': {int(scores.isnan().sum())} of {scores.numel()} "
                "scores are NaN. Did training diverge? Lower the learning rate and train again."
            )
        shape = layer.mask_shape
        if scores is None:
            bits = state_dict[bits_key]
        else:
            bits = layer.rule(adapter_name).packed_mask(scores, shape, layer.positions(adapter_name))
        with onloaded(layer):
            base = None if portable else _base_to_code_against(layer)
            tensors[bits_key] = write_record(bits, shape, layer.fingerprint(), base)
        if not portable and base is None:
            inexact.append(_module_name(path))
        if count_zeros(bits, shape) == shape.numel():
            dead.append(_module_name(path))
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
            sizes[_module_name(path)] = len(
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
    layers = {_module_name(path): (path, layer) for path, layer in layers_of_adapter(model, adapter_name).items()}
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
    others = own_tensors(model, adapter_name, others)
    rebuilt = False
    loaded: dict[str, torch.Tensor] = {}
    for name, (path, layer) in layers.items():
        bits = checked_bits(name, layer, records[name], config)
        if adapter_name in layer.peft_mask_bits:
            loaded[f"{path}{BITS}.{adapter_name}"] = bits
            continue
        parameter, positions = layer.peft_mask_scores[adapter_name], layer.positions(adapter_name)
        if name in scores:
            if positions is not None:
                positions = _checked_positions(name, candidates.get(name), layer.unmerged_weight(), parameter)
            value = scores[name]
            off = count_zeros(bits, layer.mask_shape)  # less than the budget while that was growing
            if not _are_scores(value, parameter) or not torch.equal(
                layer.rule(adapter_name).packed_mask(value, layer.mask_shape, positions, most=off).cpu(), bits
            ):
                raise ValueError(
                    f"cannot load the scores of '{name}': they do not belong to the mask beside them. The checkpoint "
                    "is damaged, or its adapter_config.json was changed."
                )
        else:
            value, positions = rebuilt_scores(name, layer, bits, config, sparse=positions is not None)
            rebuilt = True
        loaded[f"{path}{_SCORES}.{adapter_name}"] = value.to(parameter.dtype)
        if positions is not None:
            loaded[f"{path}{_POSITIONS}.{adapter_name}"] = positions
    if rebuilt:
        warnings.warn(
            f"the adapter '{adapter_name}' holds masks without scores: every score restarts at init_margin "
            f"({restart_margin(config):g}) above or below the threshold. Training goes on from the mask, but not as if "
            "it had never stopped; for that, train with MaskCallback, which keeps the scores in checkpoints.",
            stacklevel=2,
        )
    for path, layer in layers.values():  # now that all masks are accepted, in place of room for their records
        if (bits_key := f"{path}{BITS}.{adapter_name}") in loaded:
            layer.peft_mask_bits.fill(adapter_name, loaded[bits_key])
        else:
            layer.peft_mask_bits.close(adapter_name)
    return others | loaded


def named(state_dict: Mapping[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names end in `suffix`, by the name of their module in the base model.

    Raises:
        ValueError: if two are of one module, with PEFT's prefix and without it.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(suffix):
            name = _module_name(key.removesuffix(suffix))
            if name in found:
                raise ValueError(f"the file holds '{name}{suffix}' twice, with the prefix '{PEFT_PREFIX}' and without.")
            found[name] = value
    return found


def _module_name(path: str) -> str:
    return path.removeprefix(PEFT_PREFIX)


def checked_bits(name: str, layer: MaskLayer, data: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    """Decode the record of a layer's mask.

    Raises:
        ValueError: if it is damaged, of another shape or (`config.check_base`) for another base weight.
    """
    with onloaded(layer):
        weight = layer.unmerged_weight()
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


def rebuilt_scores(
    name: str, layer: MaskLayer, bits: torch.Tensor, config: MaskConfig, sparse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores that come to the mask `bits`, and their positions if there are to be candidates."""
    weight, positions = layer.unmerged_weight(), None
    mask = unpack_bits(bits, weight.shape)
    if sparse:
        off = (~mask).reshape(-1).nonzero().squeeze(1)
        try:
            positions = choose_candidates(weight, config, name, include=off)
        except ValueError as error:
            raise ValueError(
                f"cannot train the mask of '{name}' on: {error}. Set candidates to a larger fraction in the adapter's "
                "adapter_config.json, or to null."
            ) from error
        assert positions is not None
        mask = mask.reshape(-1)[positions.to(mask.device).long()]
    margin = restart_margin(config)
    scores = torch.where(mask, margin, -margin)
    if config.group is not None or config.structure != "weight":
        rule = layer.rule_for(config, name)
        scores = scores[tuple(slice(None, None, step) for step in rule.unit)]  # one of each block
        if not torch.equal(per_weight(rule.mask(scores), mask.shape), mask):
            field = f"pattern={config.pattern!r}" if config.group else f"structure={config.structure!r}"
            raise ValueError(
                f"cannot train the mask of '{name}' on: it is not of the kind that {field} in the adapter's "
                "adapter_config.json says. Is it a combination of several?"
            )
    return scores, positions


def _are_scores(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    real = value.is_floating_point() and value.dtype.itemsize > 1
    return real and value.shape == parameter.shape and not bool(value.isnan().any())


def _checked_positions(
    name: str, positions: torch.Tensor | None, weight: torch.Tensor, parameter: torch.Tensor
) -> torch.Tensor:
    if (
        positions is None
        or positions.dtype not in (torch.int32, torch.int64)
        or positions.shape != parameter.shape
        or not ((positions >= 0) & (positions < weight.numel())).all()
        or not (positions.diff() > 0).all()
    ):
        raise ValueError(
            f"cannot load the scores of '{name}': which weights they belong to is missing or malformed "
            f"(expected {parameter.numel()} ascending positions below {weight.numel()}). The checkpoint is damaged, or "
            "its adapter_config.json was changed."
        )
    return positions
