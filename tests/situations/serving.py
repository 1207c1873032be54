"""Several adapters, generation, tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from tests.situations.methods import Method
from tests.situations.models import classifier, decoder, logits, network, saved
from tests.situations.table import situation
from tests.tiny_models import tiny_inputs

PART = "Serving"


def two(method: Method, folder: Path) -> tuple[PeftModel, list[torch.Tensor]]:
    """A decoder with two adapters, and what each computes alone."""
    alone = [
        saved(method, decoder(), folder / name, seed=seed, task_type="CAUSAL_LM") for seed, name in enumerate("ab")
    ]
    model = PeftModel.from_pretrained(decoder(), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    return model.eval(), alone


@situation(PART, "Two adapters in one batch (`adapter_names`): each row as if alone", lora="right", mask="right")
def mixed_batch(method: Method, folder: Path) -> bool:
    model, alone = two(method, folder)
    both = logits(model, adapter_names=["a", "b"])
    return torch.allclose(both, torch.stack([alone[0][0], alone[1][1]]), atol=1e-5)


@situation(
    PART,
    "The same with beams that stand in `generation_config`: the rows of each adapter",
    lora="refused",
    mask="right",
    lora_refusal="Length of `adapter_names` should be the same as the number of inputs",
)
def beams_in_the_configuration(method: Method, folder: Path) -> bool:
    model, _ = two(method, folder)
    ids = tiny_inputs(decoder())["input_ids"][:, :4].clamp(min=4)
    told = model.generate(input_ids=ids, max_new_tokens=4, num_beams=2, adapter_names=["a", "b"])
    model.generation_config.num_beams = 2
    return torch.equal(model.generate(input_ids=ids, max_new_tokens=4, adapter_names=["a", "b"]), told)


@situation(PART, "Switch between two adapters and back: the same outputs, to the bit", lora="right", mask="right")
def switched(method: Method, folder: Path) -> bool:
    model, alone = two(method, folder)
    outputs = []
    for name in "aba":
        model.set_adapter(name)
        outputs.append(logits(model))
    return torch.equal(outputs[0], alone[0]) and torch.equal(outputs[1], alone[1]) and torch.equal(outputs[2], alone[0])


@situation(PART, "Merge one adapter, then another after unmerging: as each alone", lora="right", mask="right")
def merged_in_turn(method: Method, folder: Path) -> bool:
    model, alone = two(method, folder)
    right = True
    for name, expected in zip("ab", alone, strict=True):
        model.set_adapter(name)
        model.merge_adapter()
        right &= torch.allclose(logits(model), expected, atol=1e-4)
        model.unmerge_adapter()
    return right


@situation(
    PART,
    "Trace a model with its adapter (`torch.jit.trace`), unmerged",
    lora="right",
    mask="refused",
    refusal="merge it first",
)
def traced(method: Method, folder: Path) -> bool:
    model = get_peft_model(network(), method.changed(target_modules=["first"])).eval()
    torch.manual_seed(3)
    x = torch.randn(3, 16)
    with torch.no_grad():
        return torch.allclose(torch.jit.trace(model, (x,), check_trace=False)(x), logits(model))


@situation(
    PART,
    "Use a name that no adapter has: an error",
    lora="refused",
    mask="refused",
    lora_refusal="Adapter nobody not found",
    refusal="Adapter nobody not found",
)
def unknown_name(method: Method, folder: Path) -> bool:
    model = get_peft_model(classifier(), method.changed(task_type="SEQ_CLS"))
    model.set_adapter("nobody")
    return False
