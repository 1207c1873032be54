"""What autograd keeps in a forward pass, counted, also of blocks that are computed again and without any weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class SavedTensors:
    """The storages that a forward pass keeps beside the model's own, each once.

    Args:
        model: the model whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, Tensor] = {}  # holding the tensors, or an address could come twice
        self._largest_block: list[int] = []

    def sizes(self) -> list[int]:
        """Return the bytes of each: those kept throughout, and those of the block that keeps most."""
        return [*_sizes(self._kept), *self._largest_block]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what autograd keeps meanwhile."""
        with self._into(self._kept):
            yield

    def block(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a block as if under checkpointing: its inputs are kept, all else for one block at a time."""
        given = (args, kwargs, getattr(function, "args", ()), getattr(function, "keywords", {}))  # if it is a `partial`
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self._keep(tensor, self._kept)
        again: dict[int, Tensor] = {}
        with self._into(again):
            output = function(*args, **kwargs)
        sizes = _sizes({address: tensor for address, tensor in again.items() if address not in self._kept})
        self._largest_block = max(self._largest_block, sizes, key=sum)
        # without its past, so that what the block kept is freed here, too
        return tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), output)

    def _keep(self, tensor: Tensor, kept: dict[int, Tensor]) -> Tensor:
        if (address := tensor.untyped_storage()._cdata) not in self._own:
            kept[address] = tensor
        return tensor

    def _into(self, kept: dict[int, Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: self._keep(t, kept), lambda t: t)


def _sizes(kept: dict[int, Tensor]) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in kept.values()]


@contextmanager
def checkpoints_counted(model: nn.Module, saved: SavedTensors) -> Iterator[None]:
    """Let blocks that transformers checkpoints, as it does in training, be counted as such."""
    blocks = [cast(Any, module) for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    before = [(block._gradient_checkpointing_func, block.training) for block in blocks]
    try:
        for block in blocks:
            block._gradient_checkpointing_func, block.training = saved.block, True
        yield
    finally:
        for block, (function, training) in zip(blocks, before, strict=True):
            block._gradient_checkpointing_func, block.training = function, training


class UnknownValues(TorchDispatchMode):
    """Answers what a model asks about values that are not there, on the meta device: with yes.

    transformers asks whether an attention mask is one everywhere, and whether a row holds one text: then there is none
    to be kept. Only such questions are answered; whoever wants a number gets torch's error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """Lets attention in 16 bits on the meta device keep what a GPU's own kernels keep: no probabilities."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) >= 3 and args[0].is_meta and args[0].itemsize == 2:
            return _FusedAttention.apply(*args[:3], args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


@contextmanager
def inputs_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let linear layers that are quantized keep their inputs, as masked they do, and nothing else.

    On the meta device they are not computed, and need not be quantized yet.
    """
    layers = [cast(Any, module) for module in modules]
    before = [layer.__dict__.get("forward") for layer in layers]  # of hooks
    try:
        for layer in layers:
            layer.forward = partial(_kept, layer, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _kept(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.is_meta:

        def forward(x: Tensor) -> Tensor:
            return x.new_empty(*x.shape[:-1], layer.out_features)

    given = x.to(getattr(layer, "compute_dtype", None) or x.dtype)
    return cast(Tensor, _Kept.apply(given, torch.zeros((), device=x.device, requires_grad=True), forward)).to(x.dtype)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        return forward(x)
