"""Where a budget switches weights off: their positions, which are all that a layer touches of its weight.

A layer could compute with a mask of all candidates, twenty times as many. On a device nothing is read back: positions
come in tensors of a fixed length, in which the number of elements of the weight stands for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from peft_mask.format.packing import index_dtype
from peft_mask.scores.binarize import threshold_of
from peft_mask.scores.order import is_in_numpy, lowest, lowest_positions


def off_positions(
    scores: torch.Tensor, positions: torch.Tensor | None, numel: int, zeros: int | torch.Tensor, most: int
) -> torch.Tensor:
    """Return where `binarize_topk(scores, zeros, most)` is False, as positions in the weight.

    Args:
        scores: (numel,) in any shape or, with `positions`, (candidates,).
        positions: (candidates,) row-major positions of the weights that have a score, ascending; None: all have.
        numel: number of elements of the weight.
        zeros: as for `binarize_topk`.
        most: the largest number of zeros.

    Returns:
        (n,) integers; n is the number of zeros on a CPU, and elsewhere `most`, of which some may be `numel`: of none.
    """
    flat, below = scores.detach().reshape(-1), threshold_of(scores.dtype)
    if (most := min(most, len(flat))) <= 0:
        return torch.empty(0, dtype=index_dtype(numel), device=scores.device)
    if isinstance(zeros, int) and is_in_numpy(flat):
        found = torch.from_numpy(np.flatnonzero(lowest(flat, zeros, below).numpy()))
        return found.to(index_dtype(numel)) if positions is None else positions.index_select(0, found)
    found = lowest_positions(flat.unsqueeze(0), most if isinstance(zeros, int) else zeros, most, below)
    return _in_the_weight(found, [positions], len(flat), numel)[0]


def off_positions_of_all(
    scores: Sequence[torch.Tensor], positions: Sequence[torch.Tensor | None], numel: int, zeros: int
) -> Sequence[torch.Tensor]:
    """Return `off_positions` of many matrices that are alike, in a few operations for all of them.

    Args:
        scores: those of each matrix, all of one length, dtype and device, which is no CPU.
        positions: of the candidates of each.
        numel: number of elements of each matrix.
        zeros: number of zeros of each, at least one.
    """
    flat = [each.detach().reshape(-1) for each in scores]
    stacked = torch.stack(flat) if len(flat) > 1 else flat[0].unsqueeze(0)
    most = min(zeros, stacked.shape[1])
    found = lowest_positions(stacked, most, most, threshold_of(stacked.dtype))
    return _in_the_weight(found, positions, stacked.shape[1], numel).unbind()


def _in_the_weight(
    found: torch.Tensor, positions: Sequence[torch.Tensor | None], columns: int, numel: int
) -> torch.Tensor:
    """Positions in the weight of those among candidates: of each row by its own candidates."""
    if positions[0] is None:
        return found.to(index_dtype(numel))
    within = found.clamp(max=columns - 1)
    chosen = [own.index_select(0, row) for own, row in zip(positions, within, strict=True) if own is not None]
    return torch.where(found < columns, torch.stack(chosen), numel)
