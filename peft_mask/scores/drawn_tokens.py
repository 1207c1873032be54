"""A part of the tokens of a batch, drawn so that the gradient of a weight is right on average."""

from __future__ import annotations

import math

import torch

from peft_mask.tensors.noise import uniform_like

LEAST = 64  # tokens: of fewer the product of all costs next to nothing


def drawn_tokens(grads: torch.Tensor, inputs: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a part of the tokens, weighted so that `grads.T @ inputs` of them is that of all on average.

    A weight's gradient is a sum over tokens of (dL/dy) x, terms of the norm |dL/dy| |x|. A token is drawn with a
    probability that grows with its norm, and counts for those that were not drawn. Tokens without a gradient, as those
    of a prompt that is no part of the loss or of padding, are the last to be drawn.

    Args:
        grads: (tokens, out) gradients of a layer's outputs.
        inputs: (tokens, in) its inputs.
        share: fraction of the tokens that is drawn, but not fewer than `LEAST`.

    Returns:
        Rows of `grads`, weighted, and the same of `inputs`, in their order; both as they are if there is nothing to
        choose. What is drawn follows from the norms (see `noise.uniform_like`): the same after a resume.

    Source: drawing terms of a product by their norms is of Drineas, Kannan and Mahoney 2006 ("Fast Monte Carlo
    Algorithms for Matrices I"). Drawing none twice, and the weights, is priority sampling (Duffield, Lund and Thorup
    2007, "Priority Sampling for Estimation of Arbitrary Subset Sums").
    """
    tokens = len(grads)
    count = max(math.ceil(share * tokens), min(LEAST, tokens))
    if count >= tokens:
        return grads, inputs
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float32)
    norms = norms.mul_(torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32))
    priorities = (norms / (1 - uniform_like(norms, key=0))).topk(count + 1)
    drawn = priorities.indices[:count].sort().values
    weights = (priorities.values[-1] / norms.index_select(0, drawn)).nan_to_num(1.0).clamp(min=1.0)
    rows = grads.index_select(0, drawn)
    return rows.mul_(weights.to(rows.dtype).unsqueeze(1)), inputs.index_select(0, drawn)
