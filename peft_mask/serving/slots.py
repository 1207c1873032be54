"""Slots: room in a model for adapters that are in use, under names of the cache's own.

PEFT would add an adapter by replacing modules, and delete it by taking them out, while others compute. A slot's modules
are made once, the first time it is needed, and stay. What changes is what its names stand for: in a layer the record of
a mask, which is one entry of a dict, and in the copy of a head the values of its tensors. Nobody reads either before a
lease names the slot, and nobody fills one that is leased; so calls that name other slots notice nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.names import module_name
from peft_mask.serving.coded import CodedAdapter, ReadAdapter
from peft_mask.serving.fitting import check_fits
from peft_mask.serving.labels import output_layer_of, put
from peft_mask.serving.source import LABELS
from peft_mask.settings.config import MaskConfig

_served: weakref.WeakSet[PeftModel] = weakref.WeakSet()


class Slots:
    """Room in a model for adapters that are in use.

    It is told from one thread at a time what to do.

    Args:
        model: a PEFT model with a mask loaded, of which each slot has what it has beside the masked weights.
        count: how many adapters may be in use at a time.

    Raises:
        TypeError: it is no PEFT model.
        ValueError: no mask is active in it, one is merged, or it has a cache already.
    """

    def __init__(self, model: PeftModel, count: int) -> None:
        self.pattern = _pattern_of(model)
        self._model = model
        self._layers = {
            module_name(path): module for path, module in model.named_modules() if isinstance(module, MaskLayer)
        }
        active = model.active_adapters[0]
        self._heads = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and active in module.modules_to_save
        }
        self._output = output_layer_of(model, self.pattern, self._heads, self._layers)
        self.count = count
        self.names: list[str] = []
        self._made = [f"slot:{number}" for number in range(count)]
        if taken := sorted(
            {*self._made} & {name for layer in self._layers.values() for name in layer.available_adapters}
        ):
            raise ValueError(f"adapters of this model are named as slots are: {taken[:3]}. Load them by other names.")
        _served.add(model)
        self._make()

    def check(self, read: ReadAdapter) -> CodedAdapter:
        """Return what is to be kept of an adapter, and refuse it if it does not fit the model, or is damaged.

        Raises:
            ValueError: the bare reason; nothing has changed.
        """
        count = check_fits(
            self._model, self._layers, self.pattern, self.names[0], self._output, read.config, read.tensors
        )
        names = read.coded.labels
        if names is not None and count is not None and len(names) != count:
            raise ValueError(
                f"its '{LABELS}' names {len(names)} labels, its head has {count}: write all of them, in the order of "
                "the logits."
            )
        return replace(read.coded, num_labels=count)

    def is_full(self) -> bool:
        """Return whether there are as many slots as there may be."""
        return len(self.names) == self.count

    def _make(self) -> str:
        """Make one more slot, which is empty."""
        name = self._made[len(self.names)]
        with torch.inference_mode(False), torch.no_grad():
            for wrapper in self._heads.values():
                wrapper.update(name)
                wrapper.modules_to_save[name].requires_grad_(False).eval()
        self.names.append(name)
        return name

    def new(self) -> str:
        """Return the name of a slot that was not there before.

        Raises:
            IndexError: there are as many as there may be.
        """
        return self._make()

    def fill(self, slot: str, adapter: CodedAdapter) -> None:
        """Put an adapter that was checked into a slot that is empty."""
        records = adapter.records()
        with torch.inference_mode(False), torch.no_grad():
            for name, record in records.items():
                self._layers[name].hold_record(slot, record)
            head = adapter.head() if self._heads else {}
            for name, place in self._tensors_of(slot):
                put(place, head[name])

    def clear(self, slot: str) -> None:
        """Forget the masks of a slot that nobody uses; its head stays, for the next adapter."""
        for layer in self._layers.values():
            layer.let_go(slot)

    def close(self) -> None:
        """Take all slots out of the model."""
        for slot in self.names:
            self.clear(slot)
            for wrapper in self._heads.values():
                wrapper.delete_adapter(slot, list(wrapper.active_adapters))
        self.names.clear()
        _served.discard(self._model)

    def _tensors_of(self, slot: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a slot's head by their names in files."""
        for path, wrapper in self._heads.items():
            head: nn.Module = wrapper.modules_to_save[slot]
            for name, tensor in head.state_dict(keep_vars=True).items():
                yield module_name(f"{path}.{name}"), tensor


def _pattern_of(model: PeftModel) -> MaskConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"a cache needs a PEFT model, got a {type(model).__name__}: make one of the base and any of the adapters, "
            "with PeftModel.from_pretrained(base, folder)."
        )
    if model in _served:
        raise ValueError("this model has a cache already: close that one first.")
    configs: Mapping[str, object] = model.peft_config
    active = model.active_adapters
    config = configs.get(active[0]) if len(active) == 1 else None
    if not isinstance(config, MaskConfig):
        raise ValueError(
            f"a cache needs a model with one mask active, whose layers and head its slots have; active: {active}."
        )
    if any(isinstance(module, TrainableTokensWrapper) for module in model.modules()):
        raise ValueError("the model has adapters with trainable_token_indices, for which there are no slots.")
    if any(isinstance(module, MaskLayer) and module.merged for module in model.modules()):
        raise ValueError("an adapter is merged into the model: call unmerge_adapter first.")
    return config
