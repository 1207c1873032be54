"""What an adapter's file may hold beside its masks: its own trained modules and token embeddings, and nothing else.

PEFT loads a tensor of any name into whatever has that name: the base's weights, or another adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_mask.format.checksums import Beside
from peft_mask.model.embeddings import base_tensor, embeddings_of, fits, is_resized, other_rows
from peft_mask.model.names import module_name, plain_name, state_name
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_flattened, is_sharded, shape_of

_ALL: Mapping[str, int] = MappingProxyType({})  # rows of every tensor


@dataclass
class Slot:
    """A tensor that an adapter trained whole.

    Attributes:
        path: of PEFT's wrapper, in the state dict.
        source: name in the file, below the path.
        target: name in the model, below the path.
        value: what the model has there.
        tokens: whose rows these are, of an embedding of which only some are trained.
    """

    path: str
    source: str
    target: str
    value: Tensor
    tokens: Sequence[int] = ()

    @property
    def name(self) -> str:
        """Name in the file, without PEFT's prefix."""
        return module_name(f"{self.path}.{self.source}")


@dataclass
class Accepted:
    """What of a file is the adapter's own.

    Attributes:
        tensors: by the names that PEFT has given them in the model, to be loaded by these.
        beside: the same and `embeddings`, as `checksums.check` wants to have them.
        embeddings: whole embeddings: path -> name of a tensor -> value (see `embeddings.bring_in`).
        rows: of embeddings that were trained in part: path -> token -> row (see `embeddings.add_rows`).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def own_tensors(
    model: nn.Module,
    adapter_name: str,
    config: MaskConfig,
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, int] = _ALL,
) -> Accepted:
    """Find those tensors that are an adapter's own, by the names that PEFT has given them in `model`.

    What has the name and the value of a tensor of the base model is left out: there is nothing to load. So is what
    older versions wrote of an embedding beside what the adapter trained of it.

    A whole embedding that is not the base's is the adapter's own if its configuration says that it was saved
    (`MaskConfig.checksums`), or if a training that has resized the vocabulary takes up a checkpoint of its own. It does
    not replace the base's.

    Args:
        model: the model, with the adapter in place.
        adapter_name: which adapter.
        config: its configuration.
        tensors: what its file holds beside masks and scores.
        rows: how many of the model's rows a file is to have of some tensors, by name in the file without PEFT's prefix;
            they are the first ones. Of other tensors it is to have all.

    Raises:
        ValueError: if one would change something else, is NaN, of another shape, or of integers where the model has
            real numbers.
    """
    slots = {module_name(f"{slot.path}.{slot.target}"): slot for slot in _slots(model, adapter_name, rows)}
    accepted, foreign = Accepted(), []
    for key, tensor in tensors.items():
        name = module_name(key)
        path, _, attribute = key.rpartition(".")
        if (slot := slots.get(name)) is not None:
            _check(slot.name, slot.value, tensor)
            accepted.tensors[key], accepted.beside[slot.name] = tensor, (tensor, slot.tokens)
        elif _is_in_base(model, path, attribute, tensor) or _is_once_more(model, adapter_name, name):
            continue
        elif (some := _rows(model, adapter_name, config, name, tensor)) is not None:
            accepted.beside[name] = tensor, ()
            accepted.rows |= some
        elif (whole := _embedding(model, path, attribute, tensor)) and _may_bring(model, config, name):
            _check(name, whole[1], tensor)
            accepted.embeddings.setdefault(whole[0], {})[attribute] = tensor
            accepted.beside[name] = tensor, ()
        else:
            foreign.append(key)
    if foreign:
        raise ValueError(
            f"cannot load the adapter '{adapter_name}': beside its masks and what it trained whole its file holds "
            f"{sorted(foreign)[:5]}, which would change the base model or another adapter. Embeddings come in this way "
            "where the vocabulary was resized before training and the configuration does not say that they were saved: "
            "put them into the base model first, or save with save_embedding_layers=False. Otherwise do not trust this "
            "file."
        )
    return accepted


def own_in(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> Beside:
    """Return what an adapter trained whole, as its file is to hold it.

    Args:
        model: the model.
        adapter_name: which adapter.
        state_dict: that of `model`.

    Raises:
        ValueError: if a tensor could not be loaded again: it is in parts or not there, or has NaN.
    """
    own = {}
    for slot in _slots(model, adapter_name):
        tensor = state_dict.get(f"{slot.path}.{slot.target}")
        if tensor is None or is_sharded(tensor) or tensor.numel() < shape_of(slot.value).numel():
            raise ValueError(
                f"cannot save '{slot.name}': it is sharded over processes. Use trainer.save_model(folder), or let all "
                "processes call accelerator.get_state_dict(model), and one of them model.save_pretrained(folder, "
                "state_dict=...) with what it returns."
            )
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(
                f"cannot save '{slot.name}': {int(tensor.isnan().sum())} of its {tensor.numel()} values are NaN. Did "
                "training diverge? Lower the learning rate and train again."
            )
        own[slot.name] = tensor, slot.tokens
    return own


def check_own_shapes(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], rows: Mapping[str, int] = _ALL
) -> Beside:
    """Return what of a file an adapter trained whole.

    Args:
        model: the model, with the adapter in place.
        adapter_name: which adapter.
        tensors: the file's tensors, by their names in it.
        rows: as in `own_tensors`.

    Raises:
        ValueError: if the file lacks something, or has it in another shape.
    """
    own = {}
    for slot in _slots(model, adapter_name, rows):
        found = tensors.get(plain_name(f"{slot.path}.{slot.source}"))
        if found is None:
            _refuse_shape(slot.name, slot.value, "nothing of that name")
        else:
            _check(slot.name, slot.value, found)
            own[slot.name] = found, slot.tokens
    return own


def own_by_name(model: nn.Module, adapter_name: str) -> Beside:
    """Return what an adapter trained whole, as it is in the model."""
    return {slot.name: (slot.value, slot.tokens) for slot in _slots(model, adapter_name)}


def _slots(model: nn.Module, adapter_name: str, rows: Mapping[str, int] = _ALL) -> Iterator[Slot]:
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state, tokens = module.state_dict(keep_vars=True), ()
            if isinstance(module, TrainableTokensWrapper):
                tokens = module.token_adapter.token_indices.get(adapter_name, ())
            for source, target in module.adapter_state_dict_load_map(adapter_name).items():
                slot = Slot(state_name(path), source, target, state[target], tokens)
                slot.value = slot.value[: rows[slot.name]] if slot.name in rows else slot.value
                yield slot


def _check(name: str, present: Tensor, tensor: Tensor) -> None:
    if tensor.is_complex() or tensor.is_floating_point() != present.is_floating_point():
        raise ValueError(f"cannot load '{name}': expected {present.dtype}, the file has {tensor.dtype}.")
    if tensor.shape != shape_of(present) and not is_flattened(present):
        _refuse_shape(name, present, f"{tuple(tensor.shape)}")
    if tensor.is_floating_point() and (bad := int(tensor.to(present.dtype).isnan().sum())):
        raise ValueError(f"cannot load '{name}': {bad} of its {tensor.numel()} values are NaN. Did training diverge?")


def _refuse_shape(name: str, present: Tensor, found: str) -> None:
    raise ValueError(
        f"cannot load '{name}': expected the shape {tuple(shape_of(present))}, the file has {found}. Was the adapter "
        "trained for another number of labels, or for another vocabulary?"
    )


def _may_bring(model: nn.Module, config: MaskConfig, name: str) -> bool:
    """Whether a file may bring an embedding: its configuration says so, or it is of a training that resized it, too."""
    said = name in (config.checksums or {}).get("tensors", {})
    return said or (not config.is_saved and is_resized(model, config))


def _embedding(model: nn.Module, path: str, attribute: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """Return path and tensor of the model's embedding in whose place an adapter's own can stand."""
    for found, module in embeddings_of(model).items():
        if module_name(found) == module_name(path) and fits(module, attribute, tensor):
            present = base_tensor(module, attribute)
            assert present is not None
            return found, present
    return None


def _is_in_base(model: nn.Module, path: str, attribute: str, tensor: Tensor) -> bool:
    """Whether the model holds this very tensor, as it does embeddings that PEFT has saved whole, unchanged."""
    base = getattr(model, "get_base_model", lambda: model)()
    try:
        module = base.get_submodule(module_name(path))
    except AttributeError:
        return False
    present = base_tensor(module, attribute)
    if present is None or present.shape != tensor.shape:
        return False
    return present.is_meta or torch.equal(tensor.to(present), present)


def _is_once_more(model: nn.Module, adapter_name: str, name: str) -> bool:
    """Whether PEFT has saved this of an embedding beside what the adapter trained in its place: older files hold it."""
    for path, module in embeddings_of(model).items():
        rest = name.removeprefix(f"{module_name(path)}.")
        if rest == name:
            continue
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            return rest.startswith(("original_module.", "modules_to_save."))
        if isinstance(module, TrainableTokensWrapper):
            return module.token_adapter.tied_adapter is not None
    return False


def _rows(
    model: nn.Module, adapter_name: str, config: MaskConfig, name: str, tensor: Tensor
) -> dict[str, dict[int, Tensor]] | None:
    """Return which rows of an embedding, trained in part, a file brings; None if it is not that, or may not."""
    for path, module in embeddings_of(model).items():
        if name != f"{module_name(path)}.token_adapter.base_layer.weight":
            continue
        if not isinstance(module, TrainableTokensWrapper) or adapter_name not in module._adapters:
            return None
        if not _may_bring(model, config, name):
            return None
        base: Any = module.original_module
        _check(name, base.weight, tensor)
        rows = other_rows(module, adapter_name, tensor)
        if rows and not config.inference_mode:
            raise ValueError(
                f"cannot train '{module_name(path)}' on: the base model has other rows for the tokens "
                f"{list(rows)[:5]} than in training, and they are not among those that are trained. Where the "
                "vocabulary is resized they are drawn: call torch.manual_seed before, or save the resized base model "
                "and start from that."
            )
        return {path: rows} if rows else {}
    return None
