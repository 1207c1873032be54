"""Labels: how many an adapter's head has, what they are called, and how they lie in a head that has room for more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_mask.format.record import read_header
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.names import module_name
from peft_mask.settings.config import MaskConfig


@dataclass(frozen=True)
class OutputLayer:
    """The layer of a task head that has an output for each label.

    Attributes:
        name: of the layer in the base model.
        labels: how many there are in the model, the most that an adapter may have.
        is_masked: whether adapters share its weight and mask it; all have the same number of labels then.
    """

    name: str
    labels: int
    is_masked: bool = False

    def labels_of(self, tensors: Mapping[str, Tensor], records: Mapping[str, Tensor]) -> int:
        """Return how many labels an adapter has; what else is wrong with its head is for others to say.

        Args:
            tensors: those of its file.
            records: of these the masks, by module name.

        Raises:
            ValueError: they are more than the model has, or other than those of its masked head; the bare reason.
        """
        if self.is_masked:
            return self._labels_of_mask(records)
        weights = [value for key, value in tensors.items() if module_name(key) == f"{self.name}.weight"]
        if not weights or weights[0].dim() != 2:
            return self.labels
        rows = len(weights[0])
        if rows > self.labels:
            raise ValueError(
                f"its head has {rows} labels, this model's {self.labels}: make the model with the adapter that has the "
                "most labels."
            )
        return rows or self.labels

    def _labels_of_mask(self, records: Mapping[str, Tensor]) -> int:
        try:
            rows = read_header(records[self.name]).shape[0]
        except (KeyError, ValueError):
            return self.labels
        if rows != self.labels:
            raise ValueError(
                f"its masked head has {rows} labels, this model's {self.labels}: adapters share the weights of a "
                "masked head, so train all with the same num_labels, the most that any of them needs, or with "
                'head="trained".'
            )
        return rows

    def rows(self, labels: int) -> dict[str, int]:
        """Return how many rows tensors of the layer have with so many labels, by their names in files."""
        return {f"{self.name}.{own}": labels for own in ("weight", "bias")}


def output_layer_of(
    model: PeftModel,
    pattern: MaskConfig,
    heads: Mapping[str, ModulesToSaveWrapper],
    layers: Mapping[str, MaskLayer],
) -> OutputLayer | None:
    """Return the layer that has an output for each label; None if the model's configuration or head tells of none.

    It is the last linear layer of the head with `config.num_labels` outputs.

    Args:
        model: the model.
        pattern: the configuration of the adapter that it was made with.
        heads: what adapters train whole, by path.
        layers: the masked layers by module name.
    """
    labels: int | None = getattr(getattr(model.get_base_model(), "config", None), "num_labels", None)
    trained = {
        module_name(f"{path}.{name}".removesuffix(".")): module
        for path, wrapper in heads.items()
        for name, module in wrapper.original_module.named_modules()
    }
    masked = {name: layer.get_base_layer() for name, layer in layers.items() if pattern.is_in_head(name)}
    for found, is_masked in ((trained, False), (masked, True)):
        fitting = [name for name, own in found.items() if isinstance(own, nn.Linear) and own.out_features == labels]
        if labels is not None and fitting:
            return OutputLayer(fitting[-1], labels, is_masked)
    return None


def put(place: Tensor, own: Tensor) -> None:
    """Write a tensor of an adapter's head into a model's, which may have rows for more labels.

    Rows of a weight that are left over become 0, and those of a bias the most negative finite number: softmax gives
    such labels nothing. Where there is no bias their logits are 0.

    Args:
        place: of the model, (labels, ...).
        own: of the adapter, of the same shape or with fewer rows.
    """
    if own.shape == place.shape:
        place.copy_(own)
        return
    rows = len(own)
    place[:rows].copy_(own)
    place[rows:].fill_(0 if place.dim() > 1 else torch.finfo(place.dtype).min)


def read_names(path: Path, text: bytes) -> tuple[str, ...]:
    """Read the names of labels, in the order of the logits.

    Args:
        path: of the file, for messages.
        text: what it holds, a JSON list of strings that are distinct.

    Raises:
        ValueError: it holds something else.
    """
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is no JSON ({error}): write the names of the labels as a list.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{path}' must be a list of strings, the names of the labels in the order of the logits.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"'{path}' names labels twice: {twice[:3]}. Each label needs a name of its own.")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"'{path}' has a name that is no text ({error}).") from error
    return tuple(names)
