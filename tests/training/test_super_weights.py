"""`super_weights` finds what was put there, says what it is worth, and leaves the model alone."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, super_weights
from tests.tiny_models import tiny_inputs, tiny_model

PLACE, ROW, COLUMN = "model.layers.1.mlp.down_proj", 5, 7


def model_with_one(scale=40.0, dtype=torch.float32):
    """A base model one weight of which is far larger than all others of its layer, and a loss that all weights hold."""
    base = tiny_model("llama", "lm").to(dtype)
    inputs = tiny_inputs(base)
    with torch.no_grad():
        base.get_submodule(PLACE).weight[ROW, COLUMN] = scale
        reference = base(**inputs).logits
    return base, inputs, lambda model: lambda batch: (model(**batch).logits - reference).float().square().mean()


def position_in(layer):
    return ROW * layer.weight.shape[1] + COLUMN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_that_outdoes_all_others_is_found_with_its_worth(dtype):
    base, inputs, loss = model_with_one(dtype=dtype)
    layer = base.get_submodule(PLACE)
    with torch.no_grad():
        layer.weight[ROW, COLUMN] = 0
        rise = float(loss(base)(inputs))
        layer.weight[ROW, COLUMN] = 40.0
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM"))
    found = super_weights(model, [inputs], loss(model), rise=rise / 2)
    assert [*found] == [PLACE]
    assert [*found[PLACE]] == [position_in(layer)]
    assert found[PLACE][position_in(layer)] == pytest.approx(rise, rel=1e-3 if dtype == torch.float32 else 0.1)


def test_nothing_is_left_behind():
    base, inputs, loss = model_with_one()
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM"))
    model.train()
    base.get_submodule("model.layers.0.mlp").eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    computed = model(**inputs).logits
    assert super_weights(model, [inputs, inputs], loss(model), rise=0.0, tried=4)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model(**inputs).logits, computed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_protect_takes_what_was_found():
    base, inputs, loss = model_with_one()
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM"))
    layer = model.base_model.model.get_submodule(PLACE)
    found = super_weights(model, [inputs], loss(model), tried=1, rise=0.0)
    (position,) = found[PLACE]
    assert position in layer.positions("default").tolist()
    model.base_model.protect(found)
    assert position not in layer.positions("default").tolist()


def test_a_model_without_such_weights_has_none():
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM"))
    found = super_weights(model, [tiny_inputs(model, labels=True)], lambda batch: model(**batch).loss, rise=0.1)
    assert found == {}


def test_without_batches_or_linear_layers_it_says_so():
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="looked for in 2 masked linear layers by 0 batches"):
        super_weights(model, [], lambda batch: model(**batch).loss)
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="looked for in 0 masked linear layers by 1 batches"):
        super_weights(model, [tiny_inputs(model, labels=True)], lambda batch: model(**batch).loss)


def test_a_weight_without_which_the_loss_is_no_number_is_the_worst():
    base, inputs, loss = model_with_one()
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM"))
    real = loss(model)
    found = super_weights(model, [inputs], lambda batch: real(batch) if real(batch) == 0 else torch.tensor(torch.nan))
    assert all(own == torch.inf for weights in found.values() for own in weights.values())
    assert sum(map(len, found.values())) > 0
    with pytest.raises(ValueError, match="a loss that is finite, got nan"):
        super_weights(model, [inputs], lambda batch: real(batch) * torch.nan)


def test_masks_that_have_zeros_are_refused():
    base, inputs, loss = model_with_one()
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM", init_weights=False))
    with pytest.raises(ValueError, match=r"those of the base: .* have weights switched off already"):
        super_weights(model, [inputs], loss(model))


def test_a_layer_that_sees_no_token_is_passed_over():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.first(x) + self.second(x[:0]).sum()

    torch.manual_seed(0)
    model = get_peft_model(Routed(), MaskConfig(target_modules=["first", "second"]))
    x = torch.randn(3, 8)
    found = super_weights(model, [x], lambda batch: -model(batch).square().mean(), rise=-torch.inf, tried=5)
    assert [*found] == ["first"]
    assert len(found["first"]) == 5


def test_what_a_weight_reads_counts_beside_its_size():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].weight[1, 0], model[0].weight[2, 3] = 5.0, 2.0  # the larger one reads little
    model = get_peft_model(model, MaskConfig(target_modules=["0"]))
    x = torch.tensor([[0.01, 0.1, 0.1, 10.0]])
    reference = model(x).detach()
    found = super_weights(model, [x], lambda batch: (model(batch) - reference).square().mean(), tried=2, rise=1e-6)
    assert [*found["0"]] == [2 * 4 + 3, 3 * 4 + 3]
