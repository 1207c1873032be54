"""Saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.situations.methods import Method
from tests.situations.models import FILE, classifier, comes_back, damage, decoder, logits, saved
from tests.situations.table import situation
from tests.tiny_models import tiny_model

PART = "Saving and loading"


@situation(PART, "Save, load onto the base: the same outputs, to the bit", lora="right", mask="right")
def round_trip(method: Method, folder: Path) -> bool:
    return comes_back(method, classifier, folder, task_type="SEQ_CLS")


@situation(
    PART,
    "Add chat tokens, train embeddings and output head whole (`modules_to_save`), save, load",
    lora="right",
    mask="right",
)
def chat_tokens(method: Method, folder: Path) -> bool:
    whole = ["embed_tokens", "lm_head"]
    return comes_back(method, lambda: decoder(70), folder, task_type="CAUSAL_LM", modules_to_save=whole)


@situation(PART, "Add tokens and train their rows only (`trainable_token_indices`)", lora="right", mask="right")
def token_rows(method: Method, folder: Path) -> bool:
    return comes_back(
        method, lambda: decoder(70, tied=True), folder, task_type="CAUSAL_LM", trainable_token_indices=[64, 65]
    )


@situation(
    PART, "Add tokens, train nothing of them, save, load onto a base resized the same way", lora="right", mask="right"
)
def resized_only(method: Method, folder: Path) -> bool:
    return comes_back(method, lambda: decoder(70), folder, task_type="CAUSAL_LM")


@situation(
    PART,
    "Load onto a base of the same shape with other weights: an error",
    lora="wrong",
    mask="refused",
    refusal="the base weight is not the one it was trained on",
)
def wrong_base(method: Method, folder: Path) -> bool:
    saved(method, classifier(), folder, task_type="SEQ_CLS")
    PeftModel.from_pretrained(tiny_model("bert", seed=1), folder)
    return False


@situation(
    PART,
    "A byte of the adapter's file was damaged: an error",
    lora="wrong",
    mask="refused",
    refusal="checksum is wrong",
)
def damaged(method: Method, folder: Path) -> bool:
    saved(method, classifier(), folder, task_type="SEQ_CLS")
    damage(folder, method.tensor)
    PeftModel.from_pretrained(classifier(), folder)
    return False


@situation(PART, "A byte of the trained head was damaged: an error", lora="wrong", mask="refused", refusal="classifier")
def damaged_head(method: Method, folder: Path) -> bool:
    saved(method, classifier(), folder, task_type="SEQ_CLS")
    damage(folder, "classifier")
    PeftModel.from_pretrained(classifier(), folder)
    return False


@situation(
    PART,
    "A tensor is missing in the file: an error",
    lora="wrong",
    mask="refused",
    refusal="do not mask the same layers",
)
def missing_tensor(method: Method, folder: Path) -> bool:
    saved(method, classifier(), folder, task_type="SEQ_CLS")
    tensors = load_file(folder / FILE)
    tensors.pop(next(name for name in sorted(tensors) if method.tensor in name))
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    PeftModel.from_pretrained(classifier(), folder)
    return False


@situation(
    PART,
    "Load an adapter for another number of labels in the place of one, which fails: the old one is as it was",
    lora="wrong",
    mask="right",
)
def failed_load(method: Method, folder: Path) -> bool:
    saved(method, classifier(5), folder / "five", task_type="SEQ_CLS", seed=5)
    computed = saved(method, classifier(), folder / "three", task_type="SEQ_CLS")
    model = PeftModel.from_pretrained(classifier(), folder / "three")
    try:
        model.load_adapter(folder / "five", "default")
        return False
    except (ValueError, RuntimeError):
        return torch.equal(logits(model), computed)


@situation(PART, "Classify images, for which PEFT has no task type: the new head is saved", lora="wrong", mask="right")
def head_without_task_type(method: Method, folder: Path) -> bool:
    computed = saved(method, tiny_model("vit"), folder)
    other = tiny_model("vit")
    torch.nn.init.normal_(other.classifier.weight)  # as `from_pretrained` draws a new head
    return torch.equal(logits(PeftModel.from_pretrained(other, folder)), computed)


@situation(PART, "Save a merged model's adapter: the same file as before merging", lora="right", mask="right")
def saved_while_merged(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    model.save_pretrained(folder / "before")
    model.merge_adapter()
    model.save_pretrained(folder / "merged")
    return (folder / "before" / FILE).read_bytes() == (folder / "merged" / FILE).read_bytes()


@situation(
    PART, "Training has diverged and everything is NaN; save: an error", lora="wrong", mask="refused", refusal="NaN"
)
def diverged(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.nan)
    model.save_pretrained(folder)
    return False


@situation(PART, "Save `torch.compile(model)`, load into a plain model", lora="right", mask="right")
def compiled(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    torch.compile(model, backend="eager").save_pretrained(folder)
    return torch.equal(logits(PeftModel.from_pretrained(classifier(), folder)), logits(model))


@situation(PART, "Load with `low_cpu_mem_usage=True`", lora="right", mask="right")
def low_memory(method: Method, folder: Path) -> bool:
    computed = saved(method, classifier(), folder, task_type="SEQ_CLS")
    return torch.equal(logits(PeftModel.from_pretrained(classifier(), folder, low_cpu_mem_usage=True)), computed)


@situation(PART, "Load by transformers' own `model.load_adapter`", lora="right", mask="right")
def transformers_door(method: Method, folder: Path) -> bool:
    computed = saved(method, decoder(), folder, task_type="CAUSAL_LM")
    model = decoder()
    model.load_adapter(str(folder))
    return torch.equal(logits(model), computed)


@situation(PART, "Copy the state dict of a loaded adapter into a fresh one", lora="right", mask="right")
def state_dict_copied(method: Method, folder: Path) -> bool:
    computed = saved(method, classifier(), folder, task_type="SEQ_CLS")
    loaded = PeftModel.from_pretrained(classifier(), folder)
    config = copy.deepcopy(loaded.peft_config["default"])
    fresh = get_peft_model(classifier(), config)
    fresh.load_state_dict(loaded.state_dict())
    return torch.equal(logits(fresh), computed)
