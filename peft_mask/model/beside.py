"""What an adapter's file may hold beside its masks: its own trained modules and token embeddings, and nothing else.

PEFT loads a tensor of any name into whatever has that name: the base's weights, or another adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_mask.model.names import module_name as _name
from peft_mask.model.names import plain_name, state_name


def own_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those tensors that are an adapter's own, by the names that PEFT has given them in `model`.

    What has the name and the value of a tensor of the base model is left out: there is nothing to load.

    Args:
        model: the model, with the adapter in place.
        adapter_name: which adapter.
        tensors: what its file holds beside masks and scores.

    Raises:
        ValueError: if one would change something else, is NaN, or is of integers where the model has real numbers.
    """
    expected = {_name(f"{path}.{target}"): value for path, _, target, value in _slots(model, adapter_name)}
    foreign = [
        key for key, tensor in tensors.items() if _name(key) not in expected and not _is_in_base(model, key, tensor)
    ]
    if foreign:
        raise ValueError(
            f"cannot load the adapter '{adapter_name}': beside its masks and what it trained whole its file holds "
            f"{sorted(foreign)[:5]}, which would change the base model or another adapter. Embeddings come in this way "
            "where the vocabulary was resized before training: put them into the base model first, or save with "
            "save_embedding_layers=False. Otherwise do not trust this file."
        )
    own = {key: tensor for key, tensor in tensors.items() if _name(key) in expected}
    for key, tensor in own.items():
        slot = expected[_name(key)]
        if tensor.is_complex() or tensor.is_floating_point() != slot.is_floating_point():
            raise ValueError(f"cannot load '{_name(key)}': expected {slot.dtype}, the file has {tensor.dtype}.")
        if tensor.is_floating_point() and tensor.to(slot.dtype).isnan().any():
            raise ValueError(
                f"cannot load '{_name(key)}': {int(tensor.to(slot.dtype).isnan().sum())} of its {tensor.numel()} "
                "values are NaN. Did training diverge?"
            )
    return own


def check_own_shapes(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` if a file lacks something that an adapter trained whole, or has it in another shape.

    Args:
        model: the model, with the adapter in place.
        adapter_name: which adapter.
        tensors: the file's tensors, by their names in it.
    """
    for path, source, _, slot in _slots(model, adapter_name):
        found = tensors.get(plain_name(f"{path}.{source}"))
        if found is None or found.shape != slot.shape:
            shape = "nothing of that name" if found is None else f"{tuple(found.shape)}"
            raise ValueError(
                f"cannot load '{_name(path)}.{source}': expected the shape {tuple(slot.shape)}, the file has {shape}. "
                "Was the adapter trained for another number of labels?"
            )


def _slots(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """Yield path of the wrapper, name in the file, name below the wrapper and value of each tensor of an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict()
            for source, target in module.adapter_state_dict_load_map(adapter_name).items():
                yield state_name(path), source, target, state[target]


def _is_in_base(model: nn.Module, key: str, tensor: torch.Tensor) -> bool:
    """Whether the model holds this very tensor, as it does embeddings that PEFT has saved whole, unchanged."""
    base = getattr(model, "get_base_model", lambda: model)()
    path, _, attribute = _name(key).rpartition(".")
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return False
    if not hasattr(module, attribute) and hasattr(module, "base_layer"):
        module = module.get_submodule("base_layer")
    present = {**module._parameters, **module._buffers}.get(attribute)
    if present is None or present.shape != tensor.shape:
        return False
    return present.is_meta or torch.equal(tensor.to(present), present)
