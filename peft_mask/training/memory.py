"""What training a mask takes, counted before it begins, on a model that need not have any weights yet."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_mask.format.packing import index_dtype
from peft_mask.layers.linear import Linear, QuantizedLinear
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.registry import mask_layer_type, stored_weights
from peft_mask.layers.stand_in import ParamWrapper
from peft_mask.model.matching import matched_modules, matched_parameters
from peft_mask.model.scored import sparsity_aimed_at
from peft_mask.model.targets import resolve_targets
from peft_mask.scores.budget import budget_zeros
from peft_mask.scores.candidates import candidate_count
from peft_mask.scores.packed_positions import packed_bytes
from peft_mask.scores.units import unit_shape
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.four_bits import as_if_quantized, bytes_beside, is_four_bits
from peft_mask.tensors.stored import StoredWeight
from peft_mask.training.saved import FusedAttention, SavedTensors, UnknownValues, checkpoints_counted, inputs_kept


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step holds, by what for.

    Attributes:
        parameters: the base model, with the copy of its head that is trained.
        scores: scores and the positions of their weights.
        gradients: of scores and head.
        optimizer: what the optimizer remembers of scores and head.
        activations: what autograd keeps for the backward pass, the masks among it: the positions that a budget has
            off, else a bit for each score, unless each is compared with the threshold anew. Of a model that checkpoints
            activations: the inputs of its blocks, and what the block keeps that keeps most while it is computed again.
        transient: W * M or `(dL/dy)^T x` of the largest layer, the only ones of its size at any time, and its indices;
            and the gradients of the largest activation and its neighbor.
    """

    parameters: int
    scores: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        """Sum of all: what a step takes at most, without the allocator's and the libraries' own share."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = [*vars(self).items(), ("total", self.total)]
        return ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in parts)


def training_memory(
    model: nn.Module, config: MaskConfig, inputs: Mapping[str, Tensor], scores_optimizer: str = "sign"
) -> TrainingMemory:
    """Estimate the memory of a training step of a mask, without making one.

    Args:
        model: the base model; on the meta device nothing is computed and nothing allocated, whatever its size (a Llama
            runs there since some release of transformers between 5.2 and 5.8). There linear layers of bitsandbytes in
            4 bits, which are quantized only where values are, count as if they were, and attention in 16 bits keeps
            what the kernels of GPUs keep, no probabilities. After `model.gradient_checkpointing_enable()` activations
            count as those of checkpointed blocks.
        config: the adapter's configuration.
        inputs: a batch as for `model(**inputs)`, on its device. On the meta device attention masks count as those of a
            batch without padding.
        scores_optimizer: `"sign"` (the default of `create_mask_optimizer`), `"sign_in_backward"` (the same with
            `SignAdamW.step_in_backward`), `"adamw"` or `"adamw_8bit"`.

    Returns:
        The estimate. Everything trained beside the scores is counted with AdamW in float32.

    Raises:
        ValueError: if there is no such optimizer, or `model` has no backbone to take the default targets from.

    Example:
        >>> import torch
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> shape = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=1000)  # the rest as in Llama 7B
        >>> with torch.device("meta"):
        ...     model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        ...     inputs = {"input_ids": torch.zeros(1, 128, dtype=torch.long)}
        >>> memory = training_memory(model, MaskConfig(), inputs)
        >>> memory.scores < memory.parameters / 2
        True
    """
    with as_if_quantized(model):
        return _estimated(model, copy.copy(config), inputs, scores_optimizer)


def _estimated(
    model: nn.Module, config: MaskConfig, inputs: Mapping[str, Tensor], scores_optimizer: str
) -> TrainingMemory:
    resolve_targets(model, config)
    itemsize = getattr(torch, config.scores_dtype).itemsize
    known = {"sign": (0, 1), "sign_in_backward": (0, 0), "adamw": (2 * itemsize, 1), "adamw_8bit": (2, 1)}
    if scores_optimizer not in known:
        raise ValueError(f"scores_optimizer must be one of {list(known)}, got {scores_optimizer!r}.")
    state, gradients = known[scores_optimizer]  # bytes a score, and how many gradients of each are held
    weights: dict[str, tuple[StoredWeight, nn.Module, type[MaskLayer]]] = {
        part: (stored, module, mask_layer_type(module))
        for name, module in matched_modules(model, config)
        for part, stored in stored_weights(module, name, config.mask_biases).items()
    }
    for name, module, parameter in matched_parameters(model, config):
        weights[name] = StoredWeight(module, parameter), module, ParamWrapper
    sparsity = sparsity_aimed_at(config, {name: stored.shape for name, (stored, *_) in weights.items()})
    compared = config.candidates is None and config.binarizer in ("threshold", "sign")
    scores = positions = masks = transient = 0
    for weight, module, kind in weights.values():
        numel = weight.shape.numel()
        count = candidate_count(numel, config)
        unit = unit_shape(weight.shape, config.structure, kind.input_dimension_of(module), config.head_size)
        own = numel // math.prod(unit) if count is None else count
        scores += own
        if sparsity is not None and math.prod(unit) == 1:
            masks += budget_zeros(numel, sparsity) * index_dtype(numel).itemsize
        elif not compared:
            masks += math.ceil(own / 8)
        if count is not None:
            positions += packed_bytes(count, numel) if kind.packs_positions else count * index_dtype(numel).itemsize
        indexed = (itemsize + 2 * weight.value_bytes // numel + 4 * kind.packs_positions) * (count or 0)
        of_its_size = 1 if kind is Linear else 2  # tensors at a time
        transient = max(transient, of_its_size * weight.value_bytes + indexed)
    heads = [
        m
        for name, m in model.named_modules()
        if any(f".{name}".endswith(f".{saved}") for saved in config.modules_to_save or [])
    ]
    head = sum(p.numel() for module in heads for p in module.parameters())
    quantized = [module for _, module, kind in weights.values() if kind is QuantizedLinear]
    kept = saved_sizes(
        model, inputs, [w.parameter for w, _, kind in weights.values() if kind is not QuantizedLinear], quantized
    )
    return TrainingMemory(
        parameters=model_bytes(model) + 4 * head,
        scores=itemsize * scores + positions,
        gradients=gradients * itemsize * scores + 4 * head,
        optimizer=state * scores + 8 * head,
        activations=sum(kept) + masks,
        transient=transient + 2 * max(kept, default=0),
    )


def model_bytes(model: nn.Module) -> int:
    """Return what a model's parameters and buffers take, and the scales of weights in 4 bits.

    Args:
        model: any model. Layers of bitsandbytes on the meta device count as if they were quantized already.
    """
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return held + sum(bytes_beside(module) for module in model.modules() if is_four_bits(module))


def saved_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, beside the model's own tensors.

    Args:
        model: any model, on any device, the meta device included. Where transformers checkpoints its activations, these
            are the inputs of the blocks, and what the largest block keeps while it is computed again.
        inputs: a batch as for `model(**inputs)`.
    """
    return sum(saved_sizes(model, inputs))


def saved_sizes(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    trained: Sequence[Tensor] | None = None,
    quantized: Sequence[nn.Module] = (),
) -> list[int]:
    """Bytes of each storage that is kept, if `trained`, by default all that ask, and `quantized` get gradients."""
    saved = SavedTensors(model)
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        if trained is not None:
            wanted = {id(p) for p in trained}
            for parameter in before:
                parameter.requires_grad_(id(parameter) in wanted)
        with ExitStack() as counting:
            for each in (saved.counted(), checkpoints_counted(model, saved), inputs_kept(quantized)):
                counting.enter_context(each)
            counting.enter_context(UnknownValues())
            counting.enter_context(FusedAttention())
            output: Any = model(**inputs)
        del output
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
    return saved.sizes()
