"""The paper's task head: random weights that are drawn by a rule of our own, frozen, and masked as all others are."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from peft_mask.format.mask_file import BIAS
from peft_mask.layers.mask_layer import MaskLayer

STANDARD_DEVIATION = 0.02  # of BERT's own new layers


def random_weight(shape: Sequence[int], seed: int, name: str) -> torch.Tensor:
    """Return a weight that looks drawn from N(0, 0.02), the same to the bit on every machine and for ever.

    Element i, in row-major order, is `0.02 * ((u_0 + ... + u_11 - 393210) / 65536)` in float64, rounded to float32,
    where the u are the sixteen-bit parts, from the lowest, of `splitmix64(k + 3i)`, `splitmix64(k + 3i + 1)` and
    `splitmix64(k + 3i + 2)`, and k is 2^32 times the CRC-32 of the text "seed/head/name". Twelve uniform numbers have a
    variance of 1 and are nearly normal, within six standard deviations; and sums of integers are exact, where
    logarithms and cosines differ between libraries.

    Args:
        shape: shape of the weight.
        seed: as in `MaskConfig.head_seed`.
        name: path of the module in the base model.

    Returns:
        float32 tensor on the CPU.

    >>> [value.hex() for value in random_weight((2,), 0, "classifier").tolist()]
    ['0x1.93bd700000000p-7', '-0x1.4a47ae0000000p-8']
    """
    key = zlib.crc32(f"{seed}/head/{name}".encode()) << 32
    words = _splitmix64(np.arange(3 * math.prod(shape), dtype=np.uint64) + np.uint64(key))
    sums = words.astype("<u8").view("<u2").reshape(-1, 12).sum(1, dtype=np.int64) - 6 * 65535
    values = STANDARD_DEVIATION * (sums / 65536)
    return torch.from_numpy(values.astype(np.float32)).view(tuple(shape))


def _splitmix64(i: np.ndarray) -> np.ndarray:
    """The i-th outputs of SplitMix64 from state 0 (https://prng.di.unimi.it/splitmix64.c)."""
    z = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


@torch.no_grad()
def draw_head(model: nn.Module, heads: Sequence[str], seed: int) -> None:
    """Overwrite a model's task head: weights of linear layers by `random_weight`, biases by 0, norms by 1 and 0.

    Layers that are masked already are left as they are: they were drawn when the first adapter came.

    Args:
        model: the base model.
        heads: names of the modules that make up its head.
        seed: as in `MaskConfig.head_seed`.

    Raises:
        ValueError: if the head has weights of another kind, or without values; nothing has changed then.
    """
    found = [part for head in heads for part in _parts(head, model.get_submodule(head))]
    for name, module in found:
        if type(module) is not nn.Linear and not isinstance(module, nn.LayerNorm):
            raise ValueError(
                f"cannot mask the head: how to draw '{name}' of type {type(module).__name__} is not known. Train the "
                'head with head="trained".'
            )
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"cannot mask the head: '{name}' is on the meta device. Load the base model's weights before the "
                "adapter."
            )
    for name, module in found:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if type(module) is nn.Linear:
            weight.copy_(random_weight(weight.shape, seed, name))
        else:
            weight.fill_(1)
        if module.bias is not None:
            module.bias.zero_()  # type: ignore[operator]


def linear_layers(model: nn.Module, parents: Sequence[str]) -> set[str]:
    """Return the names of the linear layers among and below the modules named, masked ones included."""
    return {
        name
        for name, module in model.named_modules()
        if any(f"{name}.".startswith(f"{parent}.") for parent in parents)
        and isinstance(module.get_base_layer() if isinstance(module, MaskLayer) else module, nn.Linear)
        and not name.endswith((".base_layer", BIAS))
    }


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with parameters of their own in a part of a head, but for those that are masked."""
    if isinstance(module, MaskLayer):
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module
    for below, child in module.named_children():
        yield from _parts(f"{name}.{below}", child)
