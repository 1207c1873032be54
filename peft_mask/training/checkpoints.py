"""What MaskCallback needs of Trainer's checkpoints: the share of a budget that was let there, and the best of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from peft_mask.model.scored import trained_scores
from peft_mask.tensors.sharded import is_in_parts
from peft_mask.training.spending import spend_budget

_KEY = "peft_mask"  # not the callback's name: of that, Trainer may make a new one, without what it was given
_ADAPTER = (SAFETENSORS_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_WHOLE_MODEL = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)


def record_share(state: TrainerState, share: float) -> None:
    """Let the checkpoints of a training say which share of the budget was let when they were written."""
    state.stateful_callbacks[_KEY] = {"share": share}


def recorded_share(state: TrainerState) -> float | None:
    """Return the share that was let at the checkpoint that a training goes on from; None if it begins anew."""
    recorded: dict[str, Any] = state.stateful_callbacks.get(_KEY, {})
    return recorded.get("share")


def warn_of_best(model: nn.Module) -> None:
    """Say before a training that its best model will not be loaded, where that is known."""
    if isinstance(model, PreTrainedModel) and getattr(model, "peft_config", None):
        warnings.warn(
            "load_best_model_at_end will fail: of a transformers model with added adapters Trainer looks for the whole "
            "model's weights, which checkpoints do not hold, and raises FileNotFoundError after the last step. Wrap "
            "it with get_peft_model, or load the best checkpoint yourself.",
            stacklevel=3,
        )


def keep_best(model: nn.Module, state: TrainerState) -> None:
    """Make a model at the end of its training that of the best checkpoint, or say that it is the last.

    Most trainers have loaded the best adapter by then. What they leave undone, with no more than a line in a log: an
    adapter that is not called "default", of which transformers looks for the file in another folder, more than one
    adapter, and adapters in a model of sentence-transformers, which copies tensors that a mask for use has not. All
    these are loaded here, from what the checkpoint's folder holds.

    Args:
        model: the model as callbacks get it.
        state: its `best_model_checkpoint` is the folder to load.
    """
    folder = Path(str(state.best_model_checkpoint))
    try:
        _load(model, folder)
    except Exception as error:  # a training is not lost for it
        warnings.warn(
            f"the masks are those of the last step ({state.global_step}), not of the best ({state.best_global_step}), "
            f"which cannot be loaded from '{folder}': {error}",
            stacklevel=3,
        )


def _load(model: nn.Module, folder: Path) -> None:
    adapters = sorted({adapter for *_, adapter in trained_scores(model)})
    if not adapters:
        return
    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder")
    path, adapted = _adapted(model, adapters)
    folders = {adapter: _folder_of(adapted, adapter, folder) for adapter in adapters}
    missing = [adapter for adapter in adapters if not _has_any(folders[adapter], _ADAPTER)]
    in_parts = any(is_in_parts(layer.peft_mask_scores[adapter]) for _, layer, adapter in trained_scores(model))
    if in_parts or (missing and _has_any(folder, _WHOLE_MODEL)):
        from transformers.trainer import TRAINER_STATE_NAME  # which takes long, unless one trains with it

        # then Trainer has loaded all tensors of the model by their names; what is missing is how many zeros they made
        share = recorded_share(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
        if share is not None:
            spend_budget(model, share)
        return
    if missing:
        raise FileNotFoundError(f"it holds no adapter named {missing}")
    beside = _tensors_beside(model, path, folder)
    for adapter, place in folders.items():
        set_peft_model_state_dict(adapted, load_peft_weights(str(place)), adapter_name=adapter)
    with torch.no_grad():
        for tensor, value in beside:
            tensor.copy_(value)


def _adapted(model: nn.Module, adapters: list[str]) -> tuple[str, nn.Module]:
    """Return the name and the outermost module that knows these adapters: the model, or one within."""
    for name, module in model.named_modules():
        if set(adapters) <= set(getattr(module, "peft_config", None) or ()):
            return name, module
    raise ValueError(f"no module of the model has a configuration of the adapters {adapters}")


def _folder_of(adapted: nn.Module, adapter: str, checkpoint: Path) -> Path:
    """Return where a checkpoint has an adapter: PEFT in a folder of its name, transformers, which saves one, beside."""
    if isinstance(adapted, (PeftModel, PeftMixedModel)) and adapter != "default":
        return checkpoint / adapter
    return checkpoint


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _tensors_beside(model: nn.Module, path: str, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a model outside the module that has adapters, each with its value in a checkpoint."""
    if not path:
        return []
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(f"{path}.")}
    if not own:
        return []
    model_class: Any = type(model)  # of sentence-transformers, whose models are made from their folders
    trust = {"trust_remote_code": True} if getattr(model, "trust_remote_code", False) else {}
    saved = model_class(str(folder), device="cpu", **trust).state_dict()
    return [(value, saved[name]) for name, value in own.items()]
