"""Positions of candidates in little more than a byte each, where four would outweigh a base of four bits.

Positions of a weight are cut into blocks of 256. How many lie in each block comes first, two bytes a block; then where
in its block each lies, one byte a position. Which weights are candidates does not matter, nor how evenly they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_mask.format.packing import index_dtype

BLOCK = 256


def packed_bytes(count: int, numel: int) -> int:
    """Return how many bytes so many positions of a weight take."""
    return 2 * -(-numel // BLOCK) + count


def pack_positions(positions: Tensor, numel: int) -> Tensor:
    """Pack positions.

    Args:
        positions: (n,) int32 or int64, row-major, ascending.
        numel: number of elements of the weight.

    Returns:
        uint8 of shape (`packed_bytes(n, numel)`,), on the device of `positions`.

    >>> pack_positions(torch.tensor([3, 256, 511]), 600).tolist()
    [1, 0, 2, 0, 0, 0, 3, 0, 255]
    """
    blocks = -(-numel // BLOCK)
    if positions.is_meta:
        return torch.empty(packed_bytes(len(positions), numel), dtype=torch.uint8, device="meta")
    block = (positions // BLOCK).long()
    counts = torch.zeros(blocks, dtype=torch.int32, device=positions.device)
    counts.index_add_(0, block, torch.ones_like(block, dtype=torch.int32))
    return torch.cat([counts.to(torch.int16).view(torch.uint8), (positions % BLOCK).to(torch.uint8)])


def unpack_positions(packed: Tensor, numel: int) -> Tensor:
    """Return what was packed: (n,) int32 wherever positions reach, on the same device, which is not waited for.

    >>> unpack_positions(pack_positions(torch.tensor([3, 256, 511]), 600), 600).tolist()
    [3, 256, 511]
    """
    blocks = -(-numel // BLOCK)
    counts, places = packed[: 2 * blocks].view(torch.int16), packed[2 * blocks :]
    starts = torch.arange(0, blocks * BLOCK, BLOCK, device=packed.device, dtype=index_dtype(numel))
    return starts.repeat_interleave(counts.long(), output_size=len(places)).add_(places)


def in_full(positions: Tensor, numel: int) -> Tensor:
    """Return positions as integers, whether they are packed, as uint8, or not."""
    return unpack_positions(positions, numel) if positions.dtype == torch.uint8 else positions
