"""The step from one mask to another, as sparse patches of weights in checkpoint coordinates.

A patch knows what stands at its positions now and what is to stand there. So it can be held against the weights of the
running model, through the very loader that will write it, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_mask.tensors.aliasing import sharing_memory
from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.off import Off


@dataclass(frozen=True)
class Patch:
    """What changes in one weight.

    Attributes:
        name: of the weight in the checkpoint.
        shape: of the whole weight there.
        indices: (changes,) int64, row-major positions.
        before: (changes,) tensor of the checkpoint's dtype, what stands there now.
        after: the same, what is to stand there.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor
    before: Tensor
    after: Tensor


def patches_between(old: Off, new: Off, checkpoint: Checkpoint) -> Iterator[Patch]:
    """Yield what turns the weights under one mask into those under another; nothing for what both have off.

    Args:
        old: what is off now.
        new: what is to be off.
        checkpoint: of the base, from which the values that come back are read.
    """
    nothing = torch.empty(0, dtype=torch.int32)
    for name in sorted({**old.positions, **new.positions}):
        was, will = (each.positions.get(name, nothing).numpy() for each in (old, new))
        back, off = (torch.from_numpy(np.setdiff1d(*pair, assume_unique=True)) for pair in ((was, will), (will, was)))
        if len(indices := torch.cat([back, off]).long()):
            weight = checkpoint.weight(name)
            base = weight.reshape(-1)[indices]
            before, after = base.clone(), base
            before[: len(back)] = 0
            after[len(back) :] = 0
            yield Patch(name, tuple(weight.shape), indices, before, after)


def check_held(model: nn.Module, patches: Iterable[Patch]) -> dict[str, int]:
    """Hold patches against the weights of a running model, which stays as it is.

    A checkpoint-shaped tensor, NaN wherever nothing is known, goes through the model's own loader as vLLM's patches do,
    and is compared where it would be copied.

    Args:
        model: with a `load_weights` that takes pairs of name and tensor, vLLM's convention.
        patches: what is to be patched.

    Returns:
        Weight name -> how many of the patch's elements this worker's part of the model has.

    Raises:
        ValueError: a weight does not hold what it should, is shared with another, or is loaded in a way that patches
            do not support. The message names it.
    """
    shared, held = _shared(model), {}
    for patch in patches:
        staged = torch.full((math.prod(patch.shape),), float("nan"), dtype=patch.before.dtype)
        staged[patch.indices] = patch.before
        try:
            with _comparing() as found:
                names = model.load_weights([(patch.name, staged.view(patch.shape))])  # type: ignore[operator]
        except (NotImplementedError, LookupError, RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"the weight '{patch.name}' cannot be patched in this model, vLLM's loader says: "
                f"{error or type(error).__name__}. Serve the mask merged."
            ) from error
        if found.other:
            raise ValueError(
                f"the weight '{patch.name}' is not in the model as it is in the base checkpoint: {found.other} of "
                f"{found.reached} values compared are others. Was the model loaded from another checkpoint, were its "
                "weights packed for a processor, or changed by somebody else?"
            )
        for name in sorted(shared.keys() & set(names or ())):
            raise ValueError(
                f"the weight '{patch.name}' is tied: in this model {shared[name]} are one, and the mask is for one of "
                "them. Serve it merged."
            )
        held[patch.name] = found.reached
    return held


@dataclass
class _Compared:
    """How many elements a loader would have written, and how many of these are other than what is there."""

    reached: int = 0
    other: int = 0


@contextmanager
def _comparing() -> Iterator[_Compared]:
    """Compare wherever a tensor would be copied into another, and copy nothing."""
    tensor: Any = torch.Tensor
    original, found = tensor.copy_, _Compared()

    def compare(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if destination.shape != source.shape or not destination.is_floating_point():
            raise NotImplementedError(
                f"it copies {source.dtype} of shape {tuple(source.shape)} into {destination.dtype} of shape "
                f"{tuple(destination.shape)}"
            )
        known = ~source.isnan()
        expected = source[known].to(destination.device, destination.dtype)
        found.reached += len(expected)
        found.other += int((destination[known.to(destination.device)] != expected).sum())
        return destination

    tensor.copy_ = compare
    try:
        yield found
    finally:
        tensor.copy_ = original


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """Return the parameters that are one with others of a model: name -> the names of all of them."""
    named = list(model.named_parameters(remove_duplicate=False))
    shared: dict[str, list[str]] = {}
    for group in sharing_memory(parameter for _, parameter in named):
        members = set(map(id, group))
        names = [name for name, parameter in named if id(parameter) in members]
        shared |= dict.fromkeys(names, names)
    return shared
