"""What diffusers does around a layer's `forward`, layerwise casting and group offloading, around any use of its weight.

Its hooks run when a module is called. A masked layer computes with the weight of its base instead, and with tensors in
containers that nothing calls: these would be of the dtype they are stored in, on the device they wait on or, offloaded
to disk, of whatever was in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

_REGISTRY = "_diffusers_hook"


def hooked_by_diffusers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those modules that diffusers has hooked."""
    return [module for module in modules if _REGISTRY in module.__dict__]


def with_hooks_of_diffusers(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Return a context around which runs what diffusers would run around calls of these modules, if it hooked any."""
    hooked = hooked_by_diffusers(modules)
    return _with_hooks(hooked) if hooked else nullcontext()


@contextmanager
def _with_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            for hook in reversed(_hooks(module)):  # the latest is the outermost
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def check_can_write(model: nn.Module) -> None:
    """Raise a `ValueError` if diffusers brings weights of a model from a copy of its own, again for each use."""
    if any(group.offload_to_disk_path is not None or group.stream is not None for group in _groups(model)):
        raise ValueError(
            "cannot merge, or unmerge: diffusers' group offloading takes weights from copies, on disk or in pinned "
            "memory, and would lose what is written. Merge before enable_group_offload, or offload without a stream "
            "and not to disk."
        )


def check_in_memory(model: nn.Module) -> None:
    """Raise a `ValueError` if diffusers keeps tensors of a model on disk: in a state dict they have no values then."""
    if any(group.offload_to_disk_path is not None for group in _groups(model)):
        raise ValueError(
            "cannot save an adapter of this model: diffusers' group offloading keeps tensors of it on disk. Save "
            "before enable_group_offload, or offload to memory."
        )


def _hooks(module: nn.Module) -> list[Any]:
    registry: Any = module.__dict__.get(_REGISTRY)
    return [] if registry is None else list(registry.hooks.values())


def _groups(model: nn.Module) -> list[Any]:
    return [hook.group for module in model.modules() for hook in _hooks(module) if hasattr(hook, "group")]
