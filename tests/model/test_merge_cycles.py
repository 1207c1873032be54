"""Merging and unmerging for each generation phase of reinforcement learning: the base stays what it is."""

import torch
from peft import LoraConfig, get_peft_model

from peft_mask import MaskConfig, MaskLayer
from tests.tiny_models import tiny_model

TARGETS = ["q_proj", "down_proj"]


def base():
    return tiny_model("llama", "lm").to(torch.bfloat16)


def changed_by_cycles(model, cycles):
    """Return how many weights of the base a merge changes, and how many are changed after merging and unmerging."""
    weights = [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
    before = [weight.detach().clone() for weight in weights]

    def changed():
        return sum(int((now != old).sum()) for now, old in zip(weights, before, strict=True))

    model.merge_adapter()
    merged = changed()
    model.unmerge_adapter()
    for _ in range(cycles - 1):
        model.merge_adapter()
        model.unmerge_adapter()
    return merged, changed()


def test_a_thousand_merges_and_unmerges_of_a_mask_change_no_weight():
    config = MaskConfig(task_type="CAUSAL_LM", target_modules=TARGETS, target_sparsity=0.05)
    model = get_peft_model(base(), config)
    model.base_model.set_scores(lambda name, weight: torch.randn(weight.shape))
    zeros = sum(int((~layer.mask("default")).sum()) for layer in model.modules() if isinstance(layer, MaskLayer))
    assert zeros > 0
    assert changed_by_cycles(model, 1000) == (zeros, 0)


def test_the_same_count_finds_what_a_lora_in_bfloat16_changes():
    model = get_peft_model(base(), LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    merged, changed = changed_by_cycles(model, 1)
    assert merged >= changed > 0
