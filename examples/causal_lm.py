"""stub"""
from __future__ import annotations
from collections.abc import Iterable
from itertools import chain
from typing import Any
import torch


def pack(texts: Iterable[str], tokenizer: Any, block_size: int) -> torch.Tensor:
    """Join texts, an end-of-text token after each, and cut the tokens into blocks; what does not fill one is left out.

    Returns:
        int64 of shape (blocks, block_size).

    Raises:
        ValueError: if the texts do not fill a block.
    """
    ends = [[*tokens, tokenizer.eos_token_id] for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor(list(chain.from_iterable(ends)))
    count = len(tokens) // block_size
    if not count:
        raise ValueError(f"{len(ends)} texts make {len(tokens)} tokens, less than one block of {block_size}.")
    return tokens[: count * block_size].view(count, block_size)
