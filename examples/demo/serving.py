"""Two masks on one base model: every switch gives the very output that the mask alone, or the base alone, gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

from examples.demo.tasks import BaseModel, Task

Check = tuple[str, bool]


def load_beside(model: PeftModel, folder: Path, task: Task) -> None:
    """Load a second adapter whose head has a number of labels of its own.

    PEFT gives each adapter a copy of the base's head to load its own head into, so for the length of the loading the
    base gets a head of the right size.
    """
    head: Any = model.get_base_model().classifier
    original = head.original_module
    head.original_module = nn.Linear(original.in_features, len(task.labels))
    model.load_adapter(str(folder), adapter_name=task.name)
    head.original_module = original


def check_serving(base: BaseModel, first: tuple[Task, Path], second: tuple[Task, Path]) -> Iterator[Check]:
    """Switch between two saved masks in one model; yield what was compared, bit for bit, and whether it was equal."""
    (task_a, folder_a), (task_b, folder_b) = first, second
    plain = base.load(task_a).eval()
    batch = next(iter(DataLoader(task_a.test, batch_size=32, collate_fn=base.collator())))
    batch.pop("labels")

    served = PeftModel.from_pretrained(base.load(task_a), str(folder_a), adapter_name=task_a.name)
    load_beside(served, folder_b, task_b)
    served.eval()
    alone = {
        task.name: _logits(PeftModel.from_pretrained(base.load(task), str(folder)).eval(), batch)
        for task, folder in (first, second)
    }
    # the mask applied as it is used: any adapter, at any moment
    for name in (task_a.name, task_b.name):
        served.set_adapter(name)
        yield f"switched to {name}: logits of {name} loaded alone", torch.equal(_logits(served, batch), alone[name])
    with served.disable_adapter():
        yield "switched off: logits of the base model", torch.equal(_logits(served, batch), _logits(plain, batch))

    # the mask written into the weights: no cost per call
    tuner: Any = served.base_model
    for name in (task_a.name, task_b.name):
        tuner.switch_adapter(name)
        changed = _count_changed(served, plain)
        equal = torch.equal(_logits(served, batch), alone[name])
        yield f"merged {name} ({changed:,} weights written over): logits of {name} loaded alone", equal
    tuner.switch_adapter(None)
    yield "switched off again: logits of the base model", torch.equal(_logits(served, batch), _logits(plain, batch))
    yield "switched off again: every weight of the base model", _same_weights(served, plain)


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def _base_weights(served: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors under the adapters, by the names they have in the base model."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight
        for name, weight in served.get_base_model().state_dict().items()
        if "peft_mask_" not in name and ".modules_to_save." not in name
    }


def _same_weights(served: PeftModel, plain: nn.Module) -> bool:
    weights, expected = _base_weights(served), plain.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def _count_changed(served: PeftModel, plain: nn.Module) -> int:
    weights = _base_weights(served)
    return sum(int((weights[name] != expected).sum()) for name, expected in plain.state_dict().items())
