"""Scores to train on with: those of a checkpoint, checked against the mask beside them, or some that come to a mask."""

from __future__ import annotations

import torch

from peft_mask.format.packing import count_zeros, unpack_bits
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.scores.candidates import choose_candidates
from peft_mask.scores.functional import per_weight
from peft_mask.scores.init import restart_margin
from peft_mask.settings.config import MaskConfig


def checked_scores(
    name: str,
    layer: MaskLayer,
    adapter_name: str,
    config: MaskConfig,
    bits: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor | None, tuple[float | None, int | None]]:
    """Check that the scores in a file come to the mask beside them.

    Args:
        name: the module's name in the base model.
        layer: the layer, with scores of the adapter.
        adapter_name: which adapter.
        config: its configuration.
        bits: the mask in the file.
        value: the scores in the file.
        positions: of their candidates, if the file has them.

    Returns:
        The positions; the sparsity that is the budget, and how many zeros the mask has if it was saved while that was
        growing.

    Raises:
        ValueError: if scores or positions do not belong to the mask or the layer.
    """
    shape, parameter = layer.mask_shape, layer.peft_mask_scores[adapter_name]
    if layer.positions(adapter_name) is None:
        positions = None
    else:
        positions = _checked_positions(name, positions, layer.unmerged_weight(), parameter)
    off, zeros = count_zeros(bits, shape), None
    sparsity = config.target_sparsity
    if sparsity is not None and config.target_bytes is not None:  # a promise in bytes may have moved it since
        sparsity = max(sparsity, off / max(shape.numel(), 1))
    rule = layer.rule(adapter_name).with_sparsity(sparsity, shape, value.device)
    fits = _are_scores(value, parameter)
    if fits and not torch.equal(rule.packed_mask(value, shape, positions).cpu(), bits):
        zeros = off
        fits = torch.equal(rule.packed_mask(value, shape, positions, most=zeros).cpu(), bits)
    if not fits:
        raise ValueError(
            f"cannot load the scores of '{name}': they do not belong to the mask beside them. The checkpoint is "
            "damaged, or its adapter_config.json was changed."
        )
    return positions, (sparsity, zeros)


def rebuilt_scores(
    name: str, layer: MaskLayer, bits: torch.Tensor, config: MaskConfig, sparse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores that come to the mask `bits`, and their positions if there are to be candidates."""
    weight, positions = layer.unmerged_weight(), None
    mask = unpack_bits(bits, weight.shape)
    if sparse:
        off = (~mask).reshape(-1).nonzero().squeeze(1)
        try:
            positions = choose_candidates(weight, config, name, include=off)
        except ValueError as error:
            raise ValueError(
                f"cannot train the mask of '{name}' on: {error}. Set candidates to a larger fraction in the adapter's "
                "adapter_config.json, or to null."
            ) from error
        assert positions is not None
        mask = mask.reshape(-1)[positions.to(mask.device).long()]
    margin = restart_margin(config)
    scores = torch.where(mask, margin, -margin)
    if config.group is not None or config.structure != "weight":
        rule = layer.rule_for(config, name)
        scores = scores[tuple(slice(None, None, step) for step in rule.unit)]  # one of each block
        if not torch.equal(per_weight(rule.mask(scores), mask.shape), mask):
            field = f"pattern={config.pattern!r}" if config.group else f"structure={config.structure!r}"
            raise ValueError(
                f"cannot train the mask of '{name}' on: it is not of the kind that {field} in the adapter's "
                "adapter_config.json says. Is it a combination of several?"
            )
    return scores, positions


def _are_scores(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    real = value.is_floating_point() and value.dtype.itemsize > 1
    return real and value.shape == parameter.shape and not bool(value.isnan().any())


def _checked_positions(
    name: str, positions: torch.Tensor | None, weight: torch.Tensor, parameter: torch.Tensor
) -> torch.Tensor:
    if (
        positions is None
        or positions.dtype not in (torch.int32, torch.int64)
        or positions.shape != parameter.shape
        or not ((positions >= 0) & (positions < weight.numel())).all()
        or not (positions.diff() > 0).all()
    ):
        raise ValueError(
            f"cannot load the scores of '{name}': which weights they belong to is missing or malformed "
            f"(expected {parameter.numel()} ascending positions below {weight.numel()}). The checkpoint is damaged, or "
            "its adapter_config.json was changed."
        )
    return positions
