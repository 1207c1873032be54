"""Whether an adapter fits a model, found out without touching the model."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from peft_mask.format.checksums import check
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.beside import check_own_shapes, own_tensors
from peft_mask.model.loading import checked_bits
from peft_mask.model.names import BITS, named, named_as_in
from peft_mask.serving.labels import OutputLayer
from peft_mask.settings.config import MaskConfig


def check_config(config: MaskConfig, pattern: MaskConfig) -> None:
    """Refuse an adapter that is for another task or another kind of head than the model has.

    Args:
        config: that of the adapter.
        pattern: that of the adapter which the model was made with.

    Raises:
        ValueError: the bare reason.
    """
    if config.task_type != pattern.task_type:
        raise ValueError(f"it is for the task {config.task_type}, this model for {pattern.task_type}.")
    if config.trainable_token_indices:
        raise ValueError(
            "it has trained tokens of its own (trainable_token_indices), for which there are no slots: load it with "
            "load_adapter."
        )
    saved, ours = (sorted(set(each.modules_to_save or ())) for each in (config, pattern))
    if saved != ours:
        raise ValueError(f"it has trained {saved} beside its masks, this model's adapters {ours}.")
    heads = [(each.head, each.head_seed) for each in (config, pattern)]
    if heads[0] != heads[1] and any(head == "masked" for head, _ in heads):
        raise ValueError(
            f"it has head={heads[0][0]!r} and head_seed={heads[0][1]}, this model's adapters {heads[1][0]!r} and "
            f"{heads[1][1]}: they share a masked head, or train one each."
        )


def check_fits(
    model: PeftModel,
    layers: Mapping[str, MaskLayer],
    pattern: MaskConfig,
    slot: str,
    output: OutputLayer | None,
    config: MaskConfig,
    tensors: Mapping[str, Tensor],
) -> int | None:
    """Refuse an adapter that is not for this model, or damaged. Nothing of the model changes.

    An adapter may have fewer labels than the model: its output layer has their rows alone then, and is checked as such.

    Args:
        model: the model.
        layers: its masked layers by module name.
        pattern: the configuration of the adapter that the model was made with.
        slot: name of a slot, for what adapters train whole.
        output: the layer that has an output for each label, if that is known.
        config: that of the adapter.
        tensors: those of its file.

    Returns:
        How many labels it has; None if the layer is not known.

    Raises:
        ValueError: the reason.
    """
    check_config(config, pattern)
    records = named(tensors, BITS)
    if not records:
        raise ValueError(f"its file holds no masks (it has {sorted(tensors)[:3]} and so on).")
    if unknown := sorted(records.keys() - layers.keys()):
        raise ValueError(
            f"it masks {unknown[:5]}, which this model does not: make the model with an adapter that masks all that "
            "the others do."
        )
    announced = config.record_bytes or []
    if records.keys() != layers.keys() and announced != [len(records[name]) for name in sorted(records)]:
        raise ValueError(
            f"its file holds {len(records)} masks, its configuration speaks of {len(announced)}: download or save it "
            "again."
        )
    labels = output.labels_of(tensors, records) if output is not None else None
    for name, record in records.items():
        checked_bits(name, layers[name], record, config)
    rows = output.rows(labels) if output is not None and labels is not None else {}
    check_own_shapes(model, slot, tensors, rows)
    others = {key: tensor for key, tensor in tensors.items() if not key.endswith(BITS)}
    accepted = own_tensors(model, slot, config, _named_for(model, slot, others), rows)
    if accepted.embeddings or accepted.rows:
        raise ValueError("it brings embeddings of its own, for which there are no slots: load it with load_adapter.")
    if config.checksums is not None:
        check(config.checksums, records, accepted.beside)
    return labels


def _named_for(model: PeftModel, slot: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an adapter trained whole by the names that PEFT would give it in the model, under a slot's name."""
    found = named_as_in(model, tensors)
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for source, target in module.adapter_state_dict_load_map(slot).items():
                if (tensor := found.pop(f"{path}.{source}", None)) is not None:
                    found[f"{path}.{target}"] = tensor
    return found
