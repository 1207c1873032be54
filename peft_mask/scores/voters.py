"""The tokens of a batch that say most about a weight's gradient: from a part of them its sign is known."""

from __future__ import annotations

import math

import torch

LEAST = 512  # tokens: of fewer, votes get noisier than a cheaper step is worth


def telling_tokens(grads: torch.Tensor, inputs: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return those tokens whose terms of `grads.T @ inputs` are largest, in their order.

    A weight's gradient is a sum over tokens of (dL/dy) x, terms of the norm |dL/dy| |x|. Tokens without a gradient, as
    those of a prompt that is no part of the loss or of padding, are the first to be left out.

    Args:
        grads: (tokens, out) gradients of a layer's outputs.
        inputs: (tokens, in) its inputs.
        share: fraction of the tokens, but not fewer than `LEAST`.

    Returns:
        Rows of `grads` and the same of `inputs`; both as they are if they are all there is to choose.

    Source: choosing terms of a product by their norm is of Drineas, Kannan and Mahoney 2006 ("Fast Monte Carlo
    Algorithms for Matrices I"), and choosing the largest of Adelman et al. 2021 ("Faster Neural Network Training with
    Approximate Tensor Operations"). That signs need no more is ours (docs/experiments.md).
    """
    tokens = len(grads)
    chosen = max(math.ceil(share * tokens), min(LEAST, tokens))
    if chosen >= tokens:
        return grads, inputs
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float32)
    norms = norms.mul_(torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32))
    which = norms.topk(chosen, sorted=False).indices.sort().values
    return grads.index_select(0, which), inputs.index_select(0, which)
