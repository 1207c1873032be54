"""The principal weights of a matrix: the largest of its low-rank approximation.

Source: "The Path Not Taken" (arXiv 2511.08567), which finds that reinforcement learning leaves them alone.
"""

from __future__ import annotations

import torch

RANK = 32
OVERSAMPLED = 10  # directions more than asked for, without which the last ones would be guesses


def low_rank(weight: torch.Tensor, rank: int = RANK, seed: int = 0) -> torch.Tensor:
    """Return the approximation of a weight by a matrix of that rank: float32, of its shape.

    Args:
        weight: any floating dtype, of two dimensions or more. What its first dimension counts are the rows of one
            matrix; but of three, if the last two are larger than the rank, it is a stack of matrices, such as experts.
            What is not finite counts as zero.
        rank: of the approximation, if the weight has that many rows and columns.
        seed: of what `torch.svd_lowrank` draws; torch's own generator is left alone.
    """
    stacked = weight.dim() == 3 and min(weight.shape[1:]) > rank
    finite = weight.detach().float().nan_to_num(0.0, 0.0, 0.0)
    matrix = finite if stacked else finite.flatten(1)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLED, *matrix.shape[-2:]), niter=4)
    return (u[..., :rank] * s[..., None, :rank] @ v[..., :rank].mT).reshape(weight.shape)


def principal(weight: torch.Tensor, count: int, rank: int = RANK) -> torch.Tensor:
    """Return the positions of the `count` largest weights of its `low_rank`, int64, row-major."""
    return low_rank(weight, rank).abs_().flatten().topk(count).indices


def off_principal(weight: torch.Tensor, count: int, rank: int = RANK) -> torch.Tensor:
    """Return how much each weight is preferred that is none of `count` principal ones: its size, and -1 for these.

    Args:
        weight: any floating dtype. Of one dimension it has no principal weights.
        count: how many count as principal.
        rank: of the approximation.

    Returns:
        Float32, flat.
    """
    size = weight.detach().reshape(-1).float().abs().nan_to_num_(0.0)
    return size if weight.dim() < 2 else size.index_fill_(0, principal(weight, count, rank), -1.0)
