"""Adapters that PEFT keeps loaded, as many as there is room for: what people do who have no cache of adapters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from torch import nn

OWN = "own"  # the adapter that a model is made with, and that no traffic names


@dataclass
class Counts:
    """Adapters asked for that could be computed with at once, that could not, and that were read from disk."""

    hits: int = 0
    misses: int = 0
    reads: int = 0


@dataclass
class Loaded:
    """Adapters that PEFT has loaded; the least recently used is deleted for one that is not there."""

    model: PeftModel
    folder_of: Callable[[str], Path]
    capacity: int
    counts: Counts = field(default_factory=Counts)
    names: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def bring(self, wanted: Sequence[str]) -> None:
        for name in dict.fromkeys(wanted):
            if name in self.names:
                self.counts.hits += 1
            else:
                self.counts.misses += 1
                self.counts.reads += 1
                if len(self.names) >= self.capacity:
                    oldest = next(own for own in self.names if own not in wanted)
                    self.model.delete_adapter(oldest)
                    del self.names[oldest]
                self.model.load_adapter(str(self.folder_of(name)), name, autocast_adapter_dtype=False)
                self.names[name] = None
            self.names.move_to_end(name)


def adapter_bytes(model: PeftModel) -> int:
    """What the tensors take of the adapter that a model was made with."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if OWN in name.split(".")}
    return sum(tensor.nbytes for tensor in tensors.values())


def add_copies(model: PeftModel, names: Sequence[str]) -> None:
    """Add copies of the own adapter by other names: PEFT would take longer for each, the more there are."""
    for module in list(model.modules()):
        for held in (*vars(module).values(), *module._modules.values()):
            if isinstance(held, (dict, nn.ModuleDict)) and OWN in held:
                held.update({name: copy.deepcopy(held[OWN]) for name in names})
            elif isinstance(held, set) and OWN in held:
                held.update(names)
