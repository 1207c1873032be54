"""Sign steps: what they do to scores, in every dtype, and that nothing else of AdamW changes."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, SignAdamW, create_mask_optimizer
from peft_mask.optim import round_stochastically


def test_a_sign_step_moves_every_parameter_by_the_learning_rate():
    p = nn.Parameter(torch.zeros(4))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 0.25}])
    p.grad = torch.tensor([1e-30, -5.0, 0.0, 3.0])
    optimizer.step()
    assert p.tolist() == [-0.25, 0.25, 0.0, -0.25]
    assert not optimizer.state, "no state"


def test_other_groups_are_those_of_adamw():
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    scores = nn.Parameter(torch.zeros(3))
    ours = SignAdamW([{"params": [scores], "sign": True}, {"params": one.parameters()}], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(ours, 1.0, 0.1, 5)
    twin = torch.optim.lr_scheduler.LinearLR(adamw, 1.0, 0.1, 5)
    for _ in range(5):
        x = torch.randn(4, 3)
        for model, optimizer, rate in ((one, ours, schedule), (other, adamw, twin)):
            (model(x).square().mean() + (scores * x).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_can_be_added_later():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SignAdamW([p], lr=0.5)
    optimizer.add_param_group({"params": [q], "sign": True})
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert q.item() == -0.5
    assert list(optimizer.state) == [p]


def test_a_closure_is_called_once_and_its_loss_returned():
    p = nn.Parameter(torch.ones(2))
    optimizer = SignAdamW([{"params": [p], "sign": True}], lr=0.5)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_a_neighbor_and_right_on_average(dtype):
    values = torch.linspace(-1.9, 1.9, 41).repeat(4000, 1)
    rounded = round_stochastically(values, dtype, torch.Generator().manual_seed(0))
    assert rounded.dtype == dtype
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    assert (rounded.float() - values).abs().max() <= step
    assert (rounded.float().mean(0) - values[0]).abs().max() < step / 30
    exact = values.to(dtype)
    assert torch.equal(round_stochastically(exact.float(), dtype), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_stay_what_they_are(dtype):
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_stochastically(values, dtype).float().nan_to_num(7.0), values.nan_to_num(7.0))


def test_steps_below_the_precision_of_bfloat16_are_not_lost():
    p = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    optimizer = SignAdamW([{"params": [p], "sign": True}], lr=1e-4)  # a 78th of the spacing at one
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.99, abs=5e-4)


def test_rounding_is_the_same_after_a_resume():
    def start():
        p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        return p, SignAdamW([{"params": [p], "sign": True}], lr=1e-3)

    def steps(p, optimizer, n):
        for _ in range(n):
            p.grad = torch.ones_like(p)
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, 6)
    first, optimizer = start()
    steps(first, optimizer, 3)
    torch.rand(5)  # the global generator has no say
    second, resumed = start()
    second.data.copy_(first.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, resumed, 3)
    assert torch.equal(whole, second)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_scores_have_the_dtype_of_the_configuration(base_dtype):
    for scores_dtype in ("float32", "bfloat16"):
        base = nn.Sequential(nn.Linear(8, 8)).to(base_dtype)
        config = MaskConfig(target_modules=["0"], scores_dtype=scores_dtype, target_sparsity=0.03)
        model = get_peft_model(base, config)
        (scores,) = (p for p in model.parameters() if p.requires_grad)
        assert scores.dtype == getattr(torch, scores_dtype)
        optimizer = create_mask_optimizer(model)
        for _ in range(3):
            model(torch.randn(4, 8, dtype=base_dtype)).square().sum().backward()
            optimizer.step()
        assert int((~model.base_model.model[0].mask("default")).sum()) == 2


def test_any_learning_rate_makes_the_same_mask():
    masks = []
    for mask_lr in (2.0**-20, 1.0):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(20, 30)), MaskConfig(target_modules=["0"]))
        optimizer = create_mask_optimizer(model, mask_lr=mask_lr)
        for _ in range(10):
            model(torch.randn(4, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        masks.append(model.base_model.model[0].mask("default"))
    assert not masks[0].all()
    assert torch.equal(*masks)


def test_scores_without_a_budget_are_trained_by_adamw():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), MaskConfig.paper(target_modules=["0"]))
    optimizer = create_mask_optimizer(model)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert [sorted(state) for state in optimizer.state.values()] == [["exp_avg", "exp_avg_sq", "step"]]
