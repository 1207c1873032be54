"""Scores -> mask: the rule that decides which weights are kept.

Scores are stored relative to the threshold, so every rule compares with zero. Around zero bfloat16 resolves far smaller
steps than around a threshold such as 0.01, where its spacing (6e-5) is a whole optimizer step.
"""

from __future__ import annotations

import torch


def binarize_threshold(scores: torch.Tensor) -> torch.Tensor:
    """Keep every weight whose score has reached the threshold: `mask = scores >= 0`.

    Args:
        scores: real-valued tensor of any shape and floating dtype, relative to the threshold (a score `s` of the paper
            with threshold `tau` is stored as `s - tau`).

    Returns:
        Boolean tensor of the same shape, True where the weight is kept. A score exactly at the threshold is kept, as in
        the paper's `>=`. A NaN score compares False: callers that store or merge a mask refuse NaN beforehand.

    Source: Zhao et al. 2020, "Masking as an Efficient Alternative to Finetuning", equation 1. (The official code uses
    `>`; with continuous scores the difference has probability zero.)
    """
    return scores >= 0
