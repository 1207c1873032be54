"""A layer that computes rows of several adapters, as one operator of a graph that is compiled once for all batches.

Whose the rows are stands in a context, which torch.compile cannot read; and a graph that knew it would be compiled for
each mixture anew. So the operator is told the layer alone, and asks for the rows when it runs, as serving engines do
with their attention.

Source: vLLM's forward context and the operators that read it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_numbers = itertools.count(1)  # 0 is that of a layer which nobody has told of rows yet
_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def make_known(layers: Iterable[Any]) -> None:
    """Give masked layers a `key_in_graph` to be found by; a copy of a layer gets another than it was copied with."""
    for layer in layers:
        if _layers.get(layer.key_in_graph) is not layer:
            layer.key_in_graph = next(_numbers)
            _layers[layer.key_in_graph] = layer


def can_be_in_graph(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return whether the operator computes what a layer would: it has no gradient, and sees no autocast.

    Args:
        x: the input.
        parameters: those of the layer.
    """
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    return not differentiable and not torch.is_autocast_enabled(x.device.type)


def in_graph(key: int, x: Tensor) -> Tensor:
    """Compute the output of the layer with this key, for rows of whatever adapters they are when the graph runs."""
    return cast(Tensor, torch.ops.peft_mask.layer_of_rows(x, key))


@torch.library.custom_op("peft_mask::layer_of_rows", mutates_args=())
def _layer_of_rows(x: Tensor, key: int) -> Tensor:
    return cast(Tensor, _layers[key].forward(x))


@_layer_of_rows.register_fake
def _(x: Tensor, key: int) -> Tensor:
    return cast(Tensor, _layers[key].output_like(x))
