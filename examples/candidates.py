"""Candidates of one's own: the large weights that a low-rank approximation of their matrix does not rest on.

"The Path Not Taken" (arXiv 2511.08567) finds that reinforcement learning leaves the principal weights alone: those that
are largest in a low-rank approximation. A mask switches off large weights, of which many are principal. So here is the
rule to compare with.
"""

from __future__ import annotations

import torch
from peft import PeftModel

from peft_mask import MaskLayer

RANK = 32
OVERSAMPLED = 10  # directions more than asked for, without which the last ones would be guesses


def low_rank(weight: torch.Tensor, rank: int = RANK, seed: int = 0) -> torch.Tensor:
    """Return the approximation of a weight by a matrix of that rank: float32, of its shape.

    Args:
        weight: any floating dtype, of two dimensions or more, of which the first makes rows.
        rank: of the approximation, if the weight has that many rows and columns.
        seed: of what `torch.svd_lowrank` draws; torch's own generator is left alone.
    """
    matrix = weight.detach().float().flatten(1)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLED, *matrix.shape), niter=4)
    return (u[:, :rank] * s[:rank] @ v[:, :rank].T).view(weight.shape)


def off_principal(weight: torch.Tensor, count: int, rank: int = RANK) -> torch.Tensor:
    """Return the positions of the `count` largest weights that are not among the `count` largest of `low_rank`.

    Args:
        weight: any floating dtype and shape of two dimensions or more.
        count: up to half of the weights.
        rank: of the approximation.

    Returns:
        int64, row-major, ascending.
    """
    principal = low_rank(weight, rank).abs().flatten().topk(count).indices
    size = weight.detach().float().abs().flatten().index_fill(0, principal, -1.0)
    return size.topk(count).indices.sort().values


def choose_off_principal(model: PeftModel, rank: int = RANK, adapter_name: str = "default") -> None:
    """Give the scores of an adapter to weights that are off the principal ones, before training.

    Raises:
        ValueError: if the adapter has scores for all weights.
    """
    chosen = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MaskLayer) and adapter_name in layer.peft_mask_scores:
            count = layer.peft_mask_scores[adapter_name].numel()
            chosen[name] = off_principal(layer.unmerged_weight(), count, rank)
    model.base_model.set_candidates(chosen, adapter_name)
