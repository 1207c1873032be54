"""Which modules are adapted, and what a configuration may say."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.situations.methods import Method
from tests.situations.models import decoder, logits, network
from tests.situations.table import situation

PART = "Choosing what is adapted"
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}


def wraps(method: Method, family: str, **more: object) -> bool:
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(family, **TINY, **more)).eval()
    ids = torch.arange(4, 14).view(1, 10)
    before = base(input_ids=ids).last_hidden_state
    model = get_peft_model(base, method.fresh()).eval()
    return torch.allclose(model(input_ids=ids).last_hidden_state, before, atol=1e-5)


@situation(PART, "Falcon, whose linear layers are of its own class, as it comes", lora="right", mask="right")
def falcon(method: Method, folder: Path) -> bool:
    return wraps(method, "falcon")


@situation(
    PART,
    "Llama 4, whose routers subclass `nn.Linear`, as it comes",
    lora="refused",
    mask="right",
    lora_refusal="'tuple' object has no attribute 'dtype'",  # in the first forward pass
)
def llama4(method: Method, folder: Path) -> bool:
    return wraps(method, "llama4_text", **EXPERTS, pad_token_id=0, intermediate_size_mlp=64)


@situation(
    PART,
    'Some blocks of all linear layers (`target_modules="all-linear"`, `layers_to_transform`): those, or an error',
    lora="refused",
    mask="right",
    lora_refusal="`layers_to_transform` cannot be used when `target_modules` is a str",
)
def some_blocks(method: Method, folder: Path) -> bool:
    model = get_peft_model(decoder(), method.fresh(target_modules="all-linear", layers_to_transform=[1]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(".layers.1." in name for name in trained)


@situation(
    PART,
    "A target that the model does not have: an error",
    lora="refused",
    mask="refused",
    lora_refusal="'q_projection'} not found in the base model",
    refusal="'q_projection'} not found in the base model, a LlamaForCausalLM. Names there end in",
)
def unknown_target(method: Method, folder: Path) -> bool:
    get_peft_model(decoder(), method.fresh(target_modules=["q_projection"]))
    return False


@situation(
    PART,
    "The output projection of `nn.MultiheadAttention` alone, whose weight is read past the layer: an error",
    lora="wrong",
    mask="refused",
    refusal="reads the weight of its out_proj directly",
)
def attention_output(method: Method, folder: Path) -> bool:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    model = get_peft_model(nn.ModuleDict({"attention": attention}), method.changed(target_modules=["out_proj"]))
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        before = model.base_model.model["attention"](x, x, x)[0]
        model.merge_adapter()
        return torch.allclose(model.base_model.model["attention"](x, x, x)[0], before, atol=1e-6)


@situation(
    PART,
    "Mamba, whose code reads a weight past its layer, merged: what the adapter computed",
    lora="refused",
    mask="right",
    lora_refusal="'out_proj' is incompatible with Mamba-based models",
)
def mamba(method: Method, folder: Path) -> bool:
    torch.manual_seed(0)
    shape = {"state_size": 8, "time_step_rank": 8, "intermediate_size": 64, "pad_token_id": 0}
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, **shape)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), method.changed(task_type="CAUSAL_LM")).eval()
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter()
        return torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)


@situation(
    PART, "`MaskConfig(r=8)`: an error that says what sets a mask's size", lora="right", mask="refused", refusal="rank"
)
def rank(method: Method, folder: Path) -> bool:
    before = logits(network())
    model = get_peft_model(network(), method.fresh(r=8, target_modules=["first"]))
    return torch.equal(logits(model), before)


@situation(
    PART,
    "A model without linear layers: an error that says so",
    lora="refused",
    mask="refused",
    lora_refusal="No `target_modules` passed",
    refusal="Sequential has no linear layer",
)
def nothing_to_adapt(method: Method, folder: Path) -> bool:
    get_peft_model(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), method.fresh(target_modules="all-linear"))
    return False
