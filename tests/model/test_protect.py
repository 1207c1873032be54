"""`protect`: what is protected is never off, and all else stays as it was."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer
from tests.tiny_models import tiny_inputs, tiny_model

NAME = "model.layers.0.mlp.down_proj"


def masked(**fields):
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM", **fields))


def layer_of(model, name=NAME):
    return model.base_model.model.get_submodule(name)


def largest(layer, count):
    return layer.base_layer.weight.detach().abs().flatten().topk(count).indices


def test_protected_weights_give_their_scores_to_the_largest_that_had_none():
    model = masked()
    layer = layer_of(model)
    count = layer.peft_mask_scores["default"].numel()
    others = layer_of(model, "model.layers.1.mlp.down_proj").positions("default").clone()
    model.base_model.protect({NAME: largest(layer, 3)})
    assert torch.equal(layer.positions("default").long(), largest(layer, count + 3)[3:].sort().values)
    assert torch.equal(layer_of(model, "model.layers.1.mlp.down_proj").positions("default"), others)


def test_other_weights_keep_their_scores():
    model = masked()
    layer = layer_of(model)
    with torch.no_grad():
        layer.peft_mask_scores["default"].copy_(torch.randn(layer.peft_mask_scores["default"].shape))
    before = dict(zip(layer.positions("default").tolist(), layer.peft_mask_scores["default"].tolist(), strict=True))
    protected = largest(layer, 3)
    model.base_model.protect({NAME: protected})
    after = dict(zip(layer.positions("default").tolist(), layer.peft_mask_scores["default"].tolist(), strict=True))
    assert {position: score for position, score in after.items() if position in before} == {
        position: score for position, score in before.items() if position not in protected.tolist()
    }
    assert sum(score == 0 for position, score in after.items() if position not in before) == 3


@pytest.mark.parametrize("portable", [True, False])
def test_training_never_switches_a_protected_weight_off(portable, tmp_path):
    """With a budget of all candidates but few, so that all that may go does."""
    model = masked(target_sparsity=0.09, portable=portable, modules_to_save=[])
    layer = layer_of(model)
    free = {name: part for name, part in model.named_modules() if hasattr(part, "peft_mask_scores")}
    protected = largest(layer, 50)
    model.base_model.protect({NAME: protected})
    optimizer = create_mask_optimizer(model)
    for _ in range(5):
        model(**tiny_inputs(model, labels=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(free) == 14
    off = ~layer.mask("default").flatten()
    assert off.any()
    assert not off[protected].any()
    assert off[largest(layer, 400)].any()
    model.eval().save_pretrained(tmp_path)
    ids = torch.arange(4, 12).view(1, -1)
    base = model.unload()
    fresh = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(layer_of(fresh).mask("default").flatten(), ~off)
    assert fresh(ids).logits.isfinite().all()


def test_what_is_not_masked_cannot_be_protected():
    model = masked(target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"protect weights of \['model\.layers\.0\.mlp\.up_proj'\]: .* does not mask"):
        model.base_model.protect({NAME: torch.tensor([0]), "model.layers.0.mlp.up_proj": torch.tensor([0])})


@pytest.mark.parametrize(
    "positions", [torch.tensor([-1]), torch.tensor([10**9]), torch.tensor([0.5]), torch.tensor([True, False]), [0.7]]
)
def test_positions_that_are_none_change_nothing(positions):
    model = masked()
    other = "model.layers.1.mlp.down_proj"
    before = layer_of(model, other).positions("default").clone()
    with pytest.raises(ValueError, match=f"protect weights of '{NAME}': expected integers from 0 to"):
        model.base_model.protect({other: largest(layer_of(model, other), 1), NAME: positions})
    assert torch.equal(layer_of(model, other).positions("default"), before)


def test_to_protect_nothing_changes_nothing():
    model = masked()
    before = layer_of(model).positions("default").clone()
    model.base_model.protect({NAME: {}})
    assert torch.equal(layer_of(model).positions("default"), before)


def test_candidates_that_are_chosen_anew_are_not_protected():
    """As the docstring says: a saved adapter is its zeros."""
    model = masked()
    layer = layer_of(model)
    protected = largest(layer, 3)
    model.base_model.protect({NAME: protected})
    assert not torch.isin(protected, layer.positions("default")).any()
    fresh = masked()
    assert torch.isin(protected, layer_of(fresh).positions("default")).all()


def test_scores_for_all_weights_protect_none():
    model = masked(candidates=None)
    with pytest.raises(ValueError, match="has a score: set candidates in MaskConfig to protect"):
        model.base_model.protect({NAME: torch.tensor([0])})
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig(target_modules=["0"], candidates=1.0))
    with pytest.raises(ValueError, match="16 of its 16 weights are candidates"):
        model.base_model.protect({"0": torch.tensor([0])})
