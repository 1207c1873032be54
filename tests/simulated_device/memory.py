"""What a training step holds on the device at the most, and what `training_memory` says of it without any weights."""

import gc
from itertools import product
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_mask import MaskConfig, create_mask_optimizer, training_memory
from tests.simulated_device.device import NAME, held, peak_of

# logits are a third of what a step holds, or more; attention keeps its probabilities on the device as in the estimate
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 8192,
    "attn_implementation": "eager",
}
TOKENS = 256
# name -> (fields of the configuration, optimizer of the scores by the names of `training_memory`)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "sign"),
    "bf16 scores, in backward": ({"scores_dtype": "bfloat16"}, "sign_in_backward"),
}


def llama(device: str, base: str) -> nn.Module:
    """A Llama in float32, bfloat16, or bfloat16 with the linear layers of its blocks in 4 bits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    model = model.to(torch.float32 if base == "float32" else torch.bfloat16)
    if base == "nf4":
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.set_submodule(name, in_four_bits(module, device))
    return model


def in_four_bits(linear: nn.Linear, device: str) -> nn.Module:
    import bitsandbytes as bnb

    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    shape = linear.in_features, linear.out_features
    layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind)
    if device != "meta":  # quantized on the CPU and moved by hand, as torch lets no one exchange this device's `.data`
        weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, **kind).to("cpu")
        weight.quant_state.to(device)
        state: dict[str, Any] = {"quant_state": weight.quant_state, "bnb_quantized": True, "module": layer}
        layer.weight = bnb.nn.Params4bit(weight.data.to(device), requires_grad=False, **kind, **state)
    return layer


def batch(device: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, TOKENS + 1, device=device).unsqueeze(0)
    return {"input_ids": ids, "labels": ids}


def config(fields: dict[str, Any]) -> MaskConfig:
    return MaskConfig(task_type="CAUSAL_LM", seed=0, init_weights=False, **fields)


def estimated(base: str, checkpointed: bool, variant: str) -> dict[str, int]:
    model, (fields, optimizer) = llama("meta", base), VARIANTS[variant]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    memory = training_memory(model, config(fields), batch("meta"), optimizer)
    return vars(memory) | {"total": memory.total}


def measured(base: str, checkpointed: bool, variant: str) -> int:
    """Bytes at the most in a second step, model and inputs included."""
    gc.collect()
    before = held()
    model: Any = llama(NAME, base)
    fields, kind = VARIANTS[variant]
    wrapped: Any = get_peft_model(model, config(fields))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer: Any = create_mask_optimizer(wrapped)
    if kind == "sign_in_backward":
        optimizer.step_in_backward()
    inputs = batch(NAME)

    def step() -> None:
        wrapped(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return held() - before + peak_of(step)


CASES = {
    f"{base}, {variant}{', checkpointed' * checkpointed}": (base, checkpointed, variant)
    for base, checkpointed, variant in product(("float32", "bfloat16", "nf4"), (False, True), VARIANTS)
}


def found(name: str) -> dict[str, Any]:
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile its kernels for every shape
        return {"measured": measured(*CASES[name]), "estimated": estimated(*CASES[name])}
