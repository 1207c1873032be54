"""Batches whose rows belong to different adapters: `adapter_names` of PEFT's `forward` and `generate`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.rows import BASE, batch_of

_REGISTERING = threading.Lock()  # torch numbers its hooks without one


@contextmanager
def rows_of(model: nn.Module, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """Tell every masked layer, and every copy of a trained module, which row of the batch is whose.

    It is told to forward passes of this thread alone: others may meanwhile run the same model with other rows.

    Args:
        model: the base model with its masked layers.
        adapter_names: for each row an adapter's name, or `"__base__"` for none.
        copies: how many rows `generate` makes of each input, one after another, except in an encoder: its beams or the
            sequences it is to return, whichever are more.

    Raises:
        TypeError: if the names are not a list.
        ValueError: if the model is in training mode, or if no layer has an adapter of a name.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list with a name for each row, got {adapter_names!r}.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    readers = [module for module in model.modules() if isinstance(module, (MaskLayer, AuxiliaryTrainingWrapper))]
    known = {name for module in readers if isinstance(module, MaskLayer) for name in module.available_adapters}
    if unknown := set(adapter_names) - known - {BASE}:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. Loaded are {sorted(known)}."
        )
    encoder = set(_encoder_modules(model)) if copies > 1 else set()
    repeated = [name for name in adapter_names for _ in range(copies)]
    with ExitStack() as hooks:
        with _REGISTERING:
            for module in readers:
                names = list(adapter_names) if module in encoder else repeated
                hooks.enter_context(module.register_forward_pre_hook(_adding(names), with_kwargs=True))
        with batch_of(adapter_names):
            yield


def _encoder_modules(model: nn.Module) -> Iterable[nn.Module]:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ()
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return encoder.modules()


def _adding(names: list[str]) -> Any:
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        # Without `kwargs`, too, it is a call of another thread: the hook was removed while torch was about to call it.
        if kwargs is None or threading.get_ident() != thread:
            return None
        return args, kwargs | {"adapter_names": names}

    return hook
