"""Merging, casting, copying."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.situations.methods import Method
from tests.situations.models import classifier, decoder, logits, network
from tests.situations.table import situation

PART = "Merging, casting, copying"


def adapted(method: Method, change: object = None) -> PeftModel:
    return get_peft_model(network(change), method.changed(target_modules=["first"]))


@situation(PART, "Merge and unmerge: the base's weights, to the bit", lora="wrong", mask="right")
def unmerged(method: Method, folder: Path) -> bool:
    base = classifier().bert.state_dict()
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    model.merge_adapter()
    model.unmerge_adapter()
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.bert.state_dict().items()}
    return all(torch.equal(now[name], tensor) for name, tensor in base.items())


@situation(PART, "Merge in bfloat16: the outputs of the unmerged adapter, to the bit", lora="wrong", mask="right")
def merged_in_bfloat16(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier().bfloat16(), method.changed(task_type="SEQ_CLS"))
    before = logits(model)
    model.merge_adapter()
    return torch.equal(logits(model), before)


@situation(PART, "Cast a trained model (`.half()`): the adapter stays what was trained", lora="right", mask="right")
def cast(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.fresh(task_type="SEQ_CLS"))
    optimizer = method.optimizer(model)
    for step in range(10):
        ids = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        model.train()(input_ids=ids, labels=ids.sum(1) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    return bool(torch.allclose(logits(model.half()).float(), trained, atol=5e-3))


@situation(PART, "Merge, cast the model, unmerge: the base in that dtype, to the bit", lora="wrong", mask="right")
def cast_while_merged(method: Method, folder: Path) -> bool:
    model = adapted(method)
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    return torch.equal(model.base_model.model.first.base_layer.weight, network().first.weight.bfloat16())


@situation(PART, "Copy a model with its adapter (`copy.deepcopy`)", lora="right", mask="right")
def copied(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    return torch.equal(logits(copy.deepcopy(model)), logits(model))


@situation(PART, "`torch.save` the whole model and load it", lora="right", mask="right")
def pickled(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    torch.save(model, folder / "model.pt")
    return torch.equal(logits(torch.load(folder / "model.pt", weights_only=False)), logits(model))


@situation(PART, "A hook of the adapted layer, there before: it still runs", lora="right", mask="right")
def hooked(method: Method, folder: Path) -> bool:
    def hook(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda module, inputs, output: output * 2)

    model = get_peft_model(network(hook), method.fresh(target_modules=["first"]))
    return torch.allclose(logits(model), logits(network(hook)))


@situation(
    PART,
    "Merge into a layer under `weight_norm`: what the adapter computed",
    lora="wrong",
    mask="refused",
    refusal="weight_norm|parametri",
)
def weight_norm(method: Method, folder: Path) -> bool:
    model = adapted(method, parametrizations.weight_norm)
    before = logits(model)
    return torch.allclose(logits(model.merge_and_unload()), before, atol=1e-5)


@situation(
    PART,
    "Merge into a layer that `torch.nn.utils.prune` has pruned: what the adapter computed",
    lora="wrong",
    mask="refused",
    refusal="prune",
)
def pruned(method: Method, folder: Path) -> bool:
    model = adapted(method, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3))
    before = logits(model)
    return torch.allclose(logits(model.merge_and_unload()), before, atol=1e-5)


@situation(
    PART,
    "Adapt an output head that is tied to the embedding, merge: the embedding is not changed with it",
    lora="wrong",
    mask="refused",
    refusal="tied",
)
def tied(method: Method, folder: Path) -> bool:
    model = get_peft_model(decoder(tied=True), method.changed(target_modules=["lm_head"]))
    before = logits(model)
    return torch.allclose(logits(model.merge_and_unload()), before, atol=1e-4)


@situation(PART, "Switch the adapter off (`disable_adapter`): the base's outputs", lora="right", mask="right")
def disabled(method: Method, folder: Path) -> bool:
    model = get_peft_model(network(), method.changed(target_modules=["first"]))
    with model.disable_adapter():
        return torch.equal(logits(model), logits(network()))
