"""What many tasks take on disk, counted from shapes: one pretrained model and a mask a task, or a model a task."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_mask.format.packing import bits_shape
from peft_mask.model.targets import checked_shapes, resolve_targets
from peft_mask.scores.budget import expected_bytes
from peft_mask.settings.config import MaskConfig


@dataclass(frozen=True)
class Storage:
    """Bytes on disk, by what for.

    Attributes:
        base: the pretrained model, without a task head: once for all masks, once a task for fine-tuning.
        mask: the masks of a task.
        head: the trained head of a task, which both need. Nothing for a head that is itself random and masked.
    """

    base: int
    mask: int
    head: int

    def masking(self, tasks: int) -> int:
        """Bytes of so many tasks as masks of one pretrained model."""
        return self.base + tasks * (self.mask + self.head)

    def finetuning(self, tasks: int) -> int:
        """Bytes of so many tasks as fine-tuned models."""
        return tasks * (self.base + self.head)

    def table(self, tasks: Iterable[int]) -> list[dict[str, float]]:
        """Return a row for each number of tasks: `tasks`, `finetuning` and `masking` in bytes, and their `ratio`."""
        return [
            {
                "tasks": number,
                "finetuning": self.finetuning(number),
                "masking": self.masking(number),
                "ratio": self.finetuning(number) / self.masking(number),
            }
            for number in tasks
        ]


def masked_shapes(model: nn.Module, config: MaskConfig) -> dict[str, torch.Size]:
    """Return the shape of every weight that `config` would mask, by module name; neither is changed.

    Args:
        model: the base model; it needs no weights (meta device).
        config: the adapter's configuration.

    Raises:
        ValueError: if a module named there cannot be masked.
    """
    config = copy.copy(config)
    resolve_targets(model, config)
    return checked_shapes(model, config)


def storage(model: nn.Module, config: MaskConfig, sparsity: float | None = None) -> Storage:
    """Count what tasks take on disk.

    Args:
        model: the base model with its head; it needs no weights (meta device). Parameters count in their dtype.
        config: the adapter's configuration.
        sparsity: None for raw bits, one a masked weight and no header, as the paper counts; or the fraction of each
            matrix that is off, for the size to expect of a file of this package, which codes where the zeros are.

    Returns:
        The bytes of base, masks and head.

    Raises:
        ValueError: if a module named by `config` cannot be masked.

    Source: the memory comparison of Zhao et al. 2020, with 32 bits a weight and one bit a masked weight.

    Example:
        >>> from transformers import AutoConfig, AutoModelForSequenceClassification
        >>> with torch.device("meta"):
        ...     bert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert"))
        >>> storage(bert, paper_config()).mask
        8921280
    """
    resolved = copy.copy(config)
    resolve_targets(model, resolved)
    shapes = checked_shapes(model, resolved)
    backbone = model.base_model if isinstance(model, PreTrainedModel) else model
    heads = [
        m
        for name, m in model.named_modules()
        if any(f".{name}".endswith(f".{saved}") for saved in resolved.modules_to_save or [])
    ]
    return Storage(
        base=sum(p.nbytes for p in backbone.parameters()),
        mask=_raw_bytes(shapes) if sparsity is None else expected_bytes(shapes, sparsity),
        head=sum(p.nbytes for module in heads for p in module.parameters()),
    )


def paper_config(blocks: Sequence[int] = range(2, 12)) -> MaskConfig:
    """Return a configuration that names what the paper masks in BERT, for counting and for random starting masks.

    Args:
        blocks: indices of the blocks whose six matrices are masked; the pooler and the classifier are masked always.

    Returns:
        `MaskConfig.paper` without a task type, since PEFT would train the classifier.

    Source: Zhao et al. 2020, section 4; official code, `main.py`, line 38.
    """
    indices = "|".join(map(str, blocks))
    matrices = r"attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense"
    pattern = rf".*\.layer\.({indices})\.({matrices})|.*pooler\.dense|classifier"
    return MaskConfig.paper(target_modules=pattern)


def _raw_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(bits_shape(shape)) for shape in shapes.values())
