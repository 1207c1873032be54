"""Ensembles of adapters of one base model: their logits, and three ways to decide together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel
from torch import Tensor

from peft_mask.analysis.evaluation import Batch, logits_of, share_right
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.mask_model import MaskModel

Vote = Literal["labels", "logits", "probabilities"]


def adapter_logits(model: PeftModel, adapters: Sequence[str], batches: Sequence[Batch]) -> Tensor:
    """Compute the logits of several adapters of one base model, which is in memory once.

    Each is merged in turn by `switch_adapter`, so that it computes as fast as the base model; heads change with them.
    Seeds, snapshots of one training and different sizes of mask make ensembles; for snapshots of a cyclic learning rate
    use transformers' `get_cosine_with_hard_restarts_schedule_with_warmup`, and save an adapter as each cycle ends.

    Args:
        model: a PEFT model with these masks loaded.
        adapters: their names.
        batches: as for `logits_of`.

    Returns:
        float32 of shape (adapters, examples, classes) on the CPU; of taggers, an example is a token with a label.
        Afterwards the same adapters are active as before, and nothing is merged: every base weight is bit for bit what
        it was.

    Raises:
        ValueError: if there is no adapter of a name, or something is merged already.
    """
    tuner = cast(MaskModel, model.base_model)
    if not isinstance(tuner, MaskModel):
        raise ValueError(f"expected a model with masks, got one with {type(tuner).__name__}.")
    if any(module.merged for module in tuner.modules() if isinstance(module, MaskLayer)):
        raise ValueError("an adapter is merged into the model: call unmerge_adapter first.")
    active = list(tuner.active_adapters)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = []
    try:
        for adapter in adapters:
            tuner.switch_adapter(adapter)
            found.append(logits_of(model, batches))
    finally:
        tuner.unmerge_adapter()
        tuner.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    return torch.stack(found)


def ensemble(logits: Tensor, by: Vote) -> Tensor:
    """Decide together.

    Args:
        logits: of shape (members, examples, classes).
        by: `"labels"`: the label that most members predict, and of several the first. `"logits"` and `"probabilities"`:
            the label with the highest sum of these.

    Returns:
        The labels, int64 of shape (examples,).

    Raises:
        ValueError: if there is no such way, or the logits are not of that shape.

    Source: official code of Zhao et al. 2020, `ensembler.py`, which sums and counts in these three ways.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[9.0, 0.0]]])
        >>> ensemble(logits, "labels").item(), ensemble(logits, "logits").item()
        (1, 0)
    """
    if by not in get_args(Vote):
        raise ValueError(f"by must be one of {list(get_args(Vote))}, got {by!r}.")
    if logits.dim() != 3:
        raise ValueError(f"expected logits of shape (members, examples, classes), got {tuple(logits.shape)}.")
    if by == "logits":
        return logits.sum(0).argmax(-1)
    if by == "probabilities":
        return logits.softmax(-1).sum(0).argmax(-1)
    votes = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    first = votes == votes.amax(-1, keepdim=True)
    return torch.where(first, torch.arange(votes.shape[-1], device=votes.device), votes.shape[-1]).amin(-1)


def ensemble_table(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Score each member and each way to decide together.

    Args:
        logits: of shape (members, examples, classes).
        labels: int64 of shape (examples,).

    Returns:
        A row each: `who` ("member 0", ..., "mean of members", "labels", "logits", "probabilities") and `accuracy`.
    """
    rows: list[dict[str, Any]] = [
        {"who": f"member {i}", "accuracy": share_right(member.argmax(-1), labels)} for i, member in enumerate(logits)
    ]
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    rows.append({"who": "mean of members", "accuracy": mean})
    rows += [{"who": by, "accuracy": share_right(ensemble(logits, by), labels)} for by in get_args(Vote)]
    return rows
