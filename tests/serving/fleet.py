"""A fleet of small adapters on disk, each with masks and a head of its own, and what each of them answers alone."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_mask import MaskConfig, MaskLayer
from tests.tiny_models import tiny_model

NAMES = [f"task-{number}" for number in range(8)]
IDS = torch.arange(14).view(2, 7) + 3
SECONDS = 30  # for what must happen; only a test that fails waits for so long


def base():
    return tiny_model("bert", "seq_cls")


def save(folder, names, seed=0, bare=None, **fields):
    """Write adapters of the same base into folders of these names."""
    settings = {"task_type": "SEQ_CLS", "target_sparsity": 0.2, "candidates": None} | fields
    model = get_peft_model(bare or base(), MaskConfig(**settings))
    for number, name in enumerate(names):
        torch.manual_seed(100 * seed + number)
        for module in model.modules():
            for own in [*getattr(module, "peft_mask_scores", {}).values()] if isinstance(module, MaskLayer) else ():
                nn.init.normal_(own)
        for module in model.modules():
            for own in module.modules_to_save.parameters() if isinstance(module, ModulesToSaveWrapper) else ():
                nn.init.normal_(own)
        model.save_pretrained(folder / name)


def largest(folder):
    """How many bytes the largest file of these adapters has."""
    return max((folder / name / "adapter_model.safetensors").stat().st_size for name in NAMES)


def served_model(folder, name=NAMES[0], bare=None):
    return PeftModel.from_pretrained(bare or base(), folder / name, adapter_name="own").eval()


def answer(model, rows):
    """What a model answers to as many texts as there are rows."""
    ids = IDS[torch.arange(len(rows)) % len(IDS)]
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=rows).logits


def alone(folder, name, bare=None):
    """What an adapter answers to both texts, loaded by PEFT and alone in a model."""
    model = PeftModel.from_pretrained(bare or base(), folder / name).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def without_head(model, rows):
    """What the backbone makes of the texts, for tests of masks alone."""
    with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=rows):
        return model.base_model.model.bert(input_ids=IDS[torch.arange(len(rows)) % len(IDS)]).pooler_output


def check_rows(logits, names, expected):
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], expected[name][row % len(IDS)], msg=lambda m, n=name: f"{n}: {m}")


def ask(cache, model, names, expected):
    """Ask for rows of some adapters, and compare each with what its adapter answers alone."""
    with cache.lease(names) as rows:
        check_rows(answer(model, rows), names, expected)


def in_threads(*calls):
    """Run calls at the same time, which begin together, and return what they return."""
    barrier = threading.Barrier(len(calls), timeout=SECONDS)

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, call) for call in calls]]


def set_when_waited_for(monkeypatch, cache, event, count):
    """Set an event once so many threads wait for one adapter."""
    join = cache._flights.join

    def joined(name):
        flight, first = join(name)
        if flight.waiting == count:
            event.set()
        return flight, first

    monkeypatch.setattr(cache._flights, "join", joined)


def trace(model):
    """All that an adapter could leave in a model."""
    return {
        "configurations": {name: str(config) for name, config in model.peft_config.items()},
        "modules": sorted(name for name, _ in model.named_modules()),
        "masks": [sorted(m.available_adapters) for m in model.modules() if isinstance(m, MaskLayer)],
        "kept": [len(m.known_zeros) for m in model.modules() if isinstance(m, MaskLayer)],
        "heads": sorted(model.base_model.model.classifier._adapters),
        "active": list(model.active_adapters),
        "tensors": {name: tensor.sum().item() for name, tensor in model.state_dict().items()},
        "attributes": sorted(vars(model)),
    }


def tensors_alive():
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(found), sum(tensor.nbytes for tensor in found)
