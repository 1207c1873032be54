"""Batches whose rows belong to different adapters: `adapter_names` of PEFT's `forward` and `generate`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_mask.layers.in_graph import make_known
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.rows import BASE, Rows, forward_rows, in_force

_PEFTS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of which PEFT mixes copies; it refuses all others
_REGISTERING = threading.Lock()  # torch numbers its hooks without one


def copies_in_generation(model: nn.Module, arguments: Mapping[str, Any]) -> set[int]:
    """Return how many rows `generate` may make of each input: its beams or the sequences it is to return.

    They are said in its arguments, in the configuration among these, or in the model's own. What is in force when these
    differ depends on the release of transformers; which it was, the rows will tell.
    """
    sources = [arguments.get("generation_config"), getattr(model, "generation_config", None)]
    named = [
        value
        for field in ("num_beams", "num_return_sequences")
        for value in (arguments.get(field), *(getattr(source, field, None) for source in sources))
    ]
    return {value for value in named if value is not None}


@contextmanager
def rows_of(
    model: nn.Module, adapter_names: Sequence[str], copies: Set[int] = frozenset(), exact: bool = False
) -> Iterator[None]:
    """Tell every masked layer, and every copy of a trained module, which row of the batch is whose.

    It is told to forward passes of this thread alone: others may meanwhile run the same model with other rows.

    Args:
        model: the base model with its masked layers.
        adapter_names: for each row an adapter's name, or `"__base__"` for none.
        copies: how many rows may come of each input, one after another (see `copies_in_generation`); modules that get
            one row of each, as an encoder's do, are told so.
        exact: whether rows are to have the bits that merged weights give.

    Raises:
        TypeError: if the names are not a list. In the call, if a trained module of several layers gets more than one
            tensor, or returns another thing than one.
        ValueError: if the model is in training mode, or if no layer has an adapter of a name.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list with a name for each row, got {adapter_names!r}.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    modules = _modules_of(model)
    layers = [module for module in modules if isinstance(module, MaskLayer)]
    known = {name for layer in layers for name in layer.available_adapters}
    if unknown := set(adapter_names) - known - {BASE}:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. Loaded are {sorted(known)}."
        )
    make_known(layers)
    rows = Rows(adapter_names, copies, layers, exact)
    with ExitStack() as hooks:
        with _REGISTERING:
            for module in modules:
                if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.original_module, _PEFTS):
                    hooks.enter_context(module.register_forward_hook(_computing(rows), with_kwargs=True))
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    hooks.enter_context(module.register_forward_pre_hook(_adding(rows), with_kwargs=True))
        with in_force(rows):
            yield


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Return all modules of a model, each once, as `modules()` does in several times the time that a call can spare."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(
                child for child in list(module._modules.values()) if child is not None
            )  # others may add some
    return list(found.values())


def _adding(rows: Rows) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        # Without `kwargs`, too, it is a call of another thread: the hook was removed while torch was about to call it.
        if kwargs is None or not rows.are_in_force():
            return None
        return args, kwargs | {"adapter_names": list(rows.repeated(len(args[0])) if args else rows.names)}

    return hook


def _computing(rows: Rows) -> Any:
    def hook(module: Any, args: Any, kwargs: Any, output: Any = None) -> Any:
        """Return what each adapter's copy makes of its rows, in place of what the active one made of all of them."""
        if output is None or not rows.are_in_force():  # without an output it is a call of another thread, as above
            return None
        others = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)]
        if not args or others or not isinstance(output, Tensor):
            raise TypeError(
                f"cannot mix adapters in a {type(module.original_module).__name__} that each has trained: it must be "
                "called with one tensor, by position, and return one. Call the model with one adapter at a time."
            )

        def forward(owner: str, x: Tensor) -> Tensor:
            copies = dict(module.modules_to_save)
            own: Tensor = copies.get(owner, module.original_module)(x, *args[1:], **kwargs)
            return own

        return forward_rows(args[0], rows.repeated(len(args[0])), forward)

    return hook
