"""Controls: masks and models that should be worse, if what is claimed of the learned ones is true."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from peft_mask.format.mask_file import weight_of
from peft_mask.format.masks import Masks
from peft_mask.scores.budget import budget_zeros
from peft_mask.scores.order import lowest

Part = Literal["embeddings", "attention", "intermediate", "output", "pooler", "classifier"]

# What transformers calls the parts in BERT, RoBERTa, MPNet, ELECTRA and (second) DistilBERT.
_PARTS: dict[Part, str] = {
    "embeddings": r"embeddings|embeddings_project",
    "attention": r"attention",
    "intermediate": r"intermediate|ffn\.lin1",
    "output": r"layer\.\d+\.output|ffn\.lin2|output_layer_norm",
    "pooler": r"pooler",
    "classifier": r"classifier|pre_classifier",
}


def shuffled(masks: Masks, seed: int = 0, among: Mapping[str, Tensor] | None = None) -> Masks:
    """Put the zeros of each mask elsewhere at random: does it matter *which* weights are off?

    Args:
        masks: learned masks.
        seed: of the permutations; that of a module depends on it and on the module's name alone.
        among: for each module the positions (row-major integers) that zeros may go to, such as its candidates; by
            default all. Learned zeros are nearly all large weights, so a shuffle over all weights also asks whether
            large ones matter; one among the candidates does not.

    Returns:
        Masks of the same modules, each with exactly as many zeros.

    Raises:
        ValueError: if a mask has more zeros than places to go to.

    Example:
        >>> masks = Masks({"0": torch.tensor([[False, True, True, True]])})
        >>> shuffled(masks, among={"0": torch.tensor([2])})["0"]
        tensor([[ True,  True, False,  True]])
    """

    def shuffle(name: str, mask: Tensor) -> Tensor:
        zeros = masks.zeros[name]
        places = torch.arange(mask.numel()) if among is None else among[name].cpu().long()
        if zeros > len(places):
            raise ValueError(f"the mask of '{name}' has {zeros} zeros, and only {len(places)} places for them.")
        chosen = places[torch.randperm(len(places), generator=_generator(seed, name))[:zeros]]
        return _all_but(chosen, mask.shape)

    return masks.map(shuffle)


def random_masks(shapes: Mapping[str, Sequence[int]], sparsity: float, seed: int = 0) -> Masks:
    """Draw masks with the same sparsity everywhere, at random places.

    Args:
        shapes: shape of each mask by module name, as `masked_shapes` returns.
        sparsity: fraction of each matrix that is off, to the nearest weight but at least one.
        seed: as in `shuffled`.

    Raises:
        ValueError: if the sparsity is not between 0 and 1.

    Example:
        >>> random_masks({"0": (10, 10)}, 0.05).sparsity
        0.05
    """
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity must be greater than 0 and less than 1, got {sparsity!r}.")
    masks = {}
    for name, shape in shapes.items():
        size = torch.Size(shape)
        order = torch.randperm(size.numel(), generator=_generator(seed, name))
        masks[name] = _all_but(order[: budget_zeros(size.numel(), sparsity)], size)
    return Masks(masks)


def magnitude_masks(masks: Masks, base: nn.Module, largest: bool = False) -> Masks:
    """Switch off the smallest weights of each matrix, as many as the learned mask does: magnitude pruning.

    Args:
        masks: learned masks, of which only the number of zeros counts.
        base: the plain base model.
        largest: switch off the largest weights instead.

    Returns:
        Masks of the same modules, each with exactly as many zeros; of weights of the same magnitude the first go.

    Raises:
        ValueError: if `base` has no such weights.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 1))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0]]))
        >>> magnitude_masks(Masks({"0": torch.tensor([[False, True, True]])}), layer)["0"]
        tensor([[ True, False,  True]])
    """

    def prune(name: str, mask: Tensor) -> Tensor:
        magnitude = weight_of(name, base, mask.shape).detach().float().abs().cpu()
        return ~lowest(magnitude.neg() if largest else magnitude, masks.zeros[name])

    return masks.map(prune)


@torch.no_grad()
def reinitialize(model: nn.Module, parts: Sequence[Part], seed: int = 0) -> list[str]:
    """Put random values in the place of chosen parts of a pretrained model, in place.

    Matrices and embeddings are drawn from N(0, s) with s = `config.initializer_range`, or 0.02; the embedding of
    padding and biases are 0, norms 1 and 0.

    Args:
        model: an encoder of transformers with BERT's names for its parts, or DistilBERT's.
        parts: of `"embeddings"`, `"attention"` (queries, keys, values and what follows them), `"intermediate"` and
            `"output"` (the two layers of the feed-forward part), `"pooler"` and `"classifier"`.
        seed: of the values; those of a module depend on it and on the module's name alone.

    Returns:
        Names of the modules that were changed.

    Raises:
        ValueError: if there is no such part, the model has none, or it has parameters that are neither of a linear
            layer nor an embedding nor a norm; nothing has changed then.

    Source: official code of Zhao et al. 2020, `random_reinit.py`.
    """
    if unknown := [part for part in parts if part not in get_args(Part)]:
        raise ValueError(f"parts must be of {list(get_args(Part))}, got {unknown}.")
    chosen: dict[str, nn.Module] = {}
    for part in parts:
        found = dict(_modules_of(model, part))
        if not found:
            raise ValueError(f"the {type(model).__name__} has no part '{part}': no module is called {_PARTS[part]}.")
        chosen |= found
    for name, module in chosen.items():
        if not isinstance(module, (nn.Linear, nn.Embedding)) and not _is_norm(module):
            raise ValueError(f"cannot draw '{name}' anew: {type(module).__name__} is not a known type of layer.")
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for name, module in chosen.items():
        _draw(module, std, _generator(seed, name))
    return list(chosen)


def _modules_of(model: nn.Module, part: Part) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if re.search(rf"(?:^|\.)(?:{_PARTS[part]})(?:\.|$)", name) and any(
            True for _ in module.parameters(recurse=False)
        ):
            yield name, module


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and isinstance(getattr(module, "weight", None), Tensor)


def _draw(module: nn.Module, std: float, generator: torch.Generator) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if _is_norm(module):
        weight.fill_(1.0)
    else:
        weight.copy_(std * torch.randn(weight.shape, generator=generator))
    if isinstance(bias, Tensor):
        bias.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        weight[module.padding_idx].zero_()


def _all_but(positions: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.ones(shape.numel(), dtype=torch.bool)
    mask[positions] = False
    return mask.view(shape)


def _generator(seed: int, name: str) -> torch.Generator:
    # torch's CPU generator looks at the lowest 32 bits of its seed only, so seed and name are hashed into these
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
