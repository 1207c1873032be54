"""What runs around a module's `forward` when it is called, hooks of torch and accelerate, around another function."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_mask.layers.diffusers_hooks import hooked_by_diffusers, with_hooks_of_diffusers

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_KINDS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def call_with_hooks(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward` as calling a module calls the module's own: with its hooks, which are handed the module.

    Nothing of it is changed meanwhile, so that several threads may do this at once.
    """
    if "_hf_hook" in module.__dict__:
        forward = partial(_with_hook_of_accelerate, module, forward)
    if any(getattr(module, hooks) for hooks in _HOOKS):
        forward = _Double(module, forward)
    return forward(*args, **kwargs)


def parts_in_use(base: nn.Module, parts: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Return a context in which the tensors of a base layer's mask are there, which nobody calls by themselves.

    Args:
        base: the base layer, whose own hooks of torch and accelerate are for `call_with_hooks`.
        parts: containers of scores, bits and positions, which accelerate or diffusers may have offloaded.
    """
    hooked = with_hooks_of_diffusers((base, *parts))
    offloaded = [part for part in parts if getattr(part.__dict__.get("_hf_hook"), "offload", False)]
    return _brought(offloaded, hooked) if offloaded else hooked


@contextmanager
def _brought(parts: Sequence[Any], also: AbstractContextManager[None]) -> Iterator[None]:
    with also, ExitStack() as stack:
        for part in parts:
            part._hf_hook.pre_forward(part)
            stack.callback(part._hf_hook.post_forward, part, None)
        yield


def is_replaced(module: nn.Module) -> bool:
    """Return whether a module's `forward` is not that of its class, hooks of accelerate and diffusers aside."""
    if hooked_by_diffusers([module]):
        return False
    forward = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


class _Double(nn.Module):
    """Another computation with the hooks of a module."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward
        for name in _HOOKS:
            hooks = [(key, partial(_hand, module, hook)) for key, hook in getattr(module, name).items()]
            setattr(self, name, OrderedDict(hooks))
        for name in _KINDS:
            setattr(self, name, getattr(module, name))


def _hand(module: nn.Module, hook: Callable[..., Any], _: nn.Module, *args: Any) -> Any:
    return hook(module, *args)


def _with_hook_of_accelerate(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `accelerate.hooks.add_hook_to_module` makes of a module's `forward`."""
    hook: Any = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        output = forward(*args, **kwargs)
    return hook.post_forward(module, output)
