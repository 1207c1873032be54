"""Sign steps: what they do to scores, in every dtype, and that nothing else of AdamW changes."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, SignAdamW, create_mask_optimizer
from peft_mask.training.sign_steps import round_stochastically, rounding_noise


def test_a_sign_step_moves_every_parameter_by_the_learning_rate():
    p = nn.Parameter(torch.zeros(4))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 0.25}])
    p.grad = torch.tensor([1e-30, -5.0, 0.0, 3.0])
    optimizer.step()
    assert p.tolist() == [-0.25, 0.25, 0.0, -0.25]
    assert {name: value.numel() for name, value in optimizer.state[p].items()} == {"step": 1, "largest": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_shrink_once_gradients_are_below_a_quarter_of_the_largest(dtype):
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 1.0}])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    for size, count in ((1.0, 1.0), (4.0, 1.0), (1.0, 1.0), (0.25, 0.5), (4.0 / 256, 0.125), (8.0, 1.0), (0.5, 0.5)):
        before = p.detach().clone()
        p.grad = size * signs
        optimizer.step()
        assert torch.equal(before - p, count * signs), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_move_in_whatever_order_they_lie_in_memory(dtype):
    """As in a model that `to(memory_format=torch.channels_last)` has reordered, whose gradients may lie otherwise."""
    grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
    scores.grad = grad
    SignAdamW([{"params": [scores], "sign": True}], lr=0.5).step()
    assert torch.equal(scores, -0.5 * grad.sign())
    assert not scores.is_contiguous()


def test_each_parameter_is_compared_with_itself():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SignAdamW([{"params": [p, q], "sign": True, "lr": 1.0}])
    for sizes in ((1.0, 1e-4), (0.01, 1e-4)):
        p.grad, q.grad = torch.full((2,), sizes[0]), torch.full((2,), sizes[1])
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -1.2))
    assert q.tolist() == [-2.0, -2.0]


def test_a_gradient_of_zeros_does_no_harm_to_later_steps():
    p = nn.Parameter(torch.zeros(2))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 1.0}])
    for gradient in ([0.0, 0.0], [2.0, -2.0], [1.0, -1.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert p.tolist() == [-2.0, 2.0]


SKIPPED = "gradients are NaN or infinite, so the optimizer has skipped the step"
BROKEN = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("where", ["scores", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_a_step_that_is_not_finite_is_skipped_whole(broken, where, dtype, first):
    parameters = {"scores": nn.Parameter(torch.zeros(3, dtype=dtype)), "head": nn.Parameter(torch.ones(2))}
    optimizer = SignAdamW([{"params": [parameters["scores"]], "sign": True}, {"params": [parameters["head"]]}], lr=0.1)

    def step(value, name):
        for other, parameter in parameters.items():
            parameter.grad = torch.ones_like(parameter)
            parameter.grad[-1] = value if other == name else -1.0
        optimizer.step()

    def now():
        return copy.deepcopy([p.detach() for p in parameters.values()]), copy.deepcopy(optimizer.state_dict())

    if not first:
        step(-1.0, where)
    before, state = now()
    with pytest.warns(UserWarning, match=SKIPPED):
        step(broken, where)
    after, unchanged = now()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert str(unchanged) == str(state)
    step(-1.0, where)  # and on it goes, with the same steps as ever
    assert (parameters["scores"].float() - before[0].float()).tolist() == pytest.approx([-0.1, -0.1, 0.1], rel=0.02)
    assert (parameters["head"] - before[1]).tolist() == pytest.approx([-0.1, 0.1], rel=0.2)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_backward_pass_a_gradient_that_is_not_finite_moves_nothing(broken, dtype):
    scores, other = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))
    head = nn.Parameter(torch.ones(2))
    optimizer = SignAdamW([{"params": [scores, other], "sign": True}, {"params": [head]}], lr=0.125)
    optimizer.step_in_backward()

    def step(value):
        factors = torch.tensor([1.0, -1.0, value], dtype=dtype)
        ((scores * factors).sum() + other.sum() + head.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(UserWarning, match=SKIPPED):
        step(broken)
    assert scores.tolist() == [0.0, 0.0, 0.0]
    assert optimizer.state[scores]["largest"] == 0
    assert other.tolist() == [-0.125, -0.125]
    assert head.tolist() == [1.0, 1.0]
    step(2.0)
    assert scores.tolist() == [-0.125, 0.125, -0.125]
    assert (head < 1.0).all()


def test_a_copy_of_an_optimizer_takes_steps():
    p = nn.Parameter(torch.zeros(2))
    optimizer = SignAdamW([{"params": [p], "sign": True}], 0.5)
    duplicate = copy.deepcopy(optimizer)
    (q,) = duplicate.param_groups[0]["params"]
    q.grad = torch.ones(2)
    duplicate.step()
    assert q.tolist() == [-0.5, -0.5]


class TestGradientScaler:
    """As in training in float16: gradients are scaled, and where they overflow the step is skipped."""

    def trained(self, scale, binarizer="topk", fused=False, dtype="float32", in_backward=False):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3))
        config = MaskConfig(
            target_modules=["0"],
            modules_to_save=["2"],
            binarizer=binarizer,
            candidates=0.5 if binarizer == "topk" else None,
            scores_dtype=dtype,
        )
        model = get_peft_model(base, config)
        optimizer = create_mask_optimizer(model, fused=fused, mask_lr=2.0**-4)
        if in_backward:
            optimizer.step_in_backward()
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0, growth_interval=100)
        states, scales = [], []
        for step in range(6):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
            if step in (2, 4):
                x[0, 0] = 6e4  # alone it passes through a layer in float16, its gradient's products do not
            with torch.autocast("cpu", torch.float16):
                loss = model(x).square().mean() * (2.0**10 if step in (2, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            states.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return states, scales, optimizer, model

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("binarizer", ["topk", "threshold", "sign", "bernoulli", "n:m"])
    def test_overflowing_steps_change_nothing(self, binarizer, dtype):
        states, scales, _, model = self.trained(2.0**14, binarizer, dtype=dtype)
        for step in range(1, 6):
            same = [torch.equal(old, new) for old, new in zip(states[step - 1], states[step], strict=True)]
            overflowed = scales[step] < scales[step - 1]
            assert overflowed is (step in (2, 4))
            assert all(same) if overflowed else not any(same)
        assert all(value.isfinite().all() for value in states[-1])
        model.base_model.model[0].mask("default")  # which refuses scores that are NaN

    def test_the_scale_is_not_taken_for_the_size_of_gradients(self):
        usual, fused = ([*self.trained(2.0**14, fused=fused)] for fused in (False, True))
        for one, other in zip(usual[0], fused[0], strict=True):
            for left, right in zip(one, other, strict=True):
                torch.testing.assert_close(left, right)
        largest = [state["largest"] for run in (usual, fused) for state in run[2].state.values() if "largest" in state]
        assert largest[0] == largest[1] < 1.0

    def test_in_the_backward_pass_scores_stay_finite(self):
        with pytest.warns(UserWarning, match=SKIPPED):
            states, *_ = self.trained(2.0**14, in_backward=True)
        assert all(value.isfinite().all() for value in states[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_takes_the_same_steps(dtype):
    def run(p, optimizer, steps):
        for step in steps:
            p.grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).to(dtype) / (step + 1) ** 2
            optimizer.step()

    def new(values):
        p = nn.Parameter(values.clone())
        return p, SignAdamW([{"params": [p], "sign": True}], lr=0.01)

    whole, first = new(torch.zeros(64, dtype=dtype)), new(torch.zeros(64, dtype=dtype))
    run(*whole, range(8))
    run(*first, range(4))
    second = new(first[0].detach())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    run(*second, range(4, 8))
    assert torch.equal(second[0], whole[0])


def test_a_state_from_before_groups_had_sizes_is_taken():
    p = nn.Parameter(torch.zeros(2))
    optimizer = SignAdamW([{"params": [p], "sign": True, "lr": 1.0}])
    state = optimizer.state_dict()
    del state["param_groups"][0]["sizes"]
    optimizer.load_state_dict(state)
    p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    assert p.tolist() == [-1.0, 1.0]


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


def test_hooks_of_a_step_are_called_once_whatever_other_optimizers_there_are():
    """torch wraps the `step` of a class, to call hooks, when its first optimizer is made."""
    score, weight = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))
    torch.optim.Adam([weight])
    torch.optim.AdamW([weight])
    optimizer = SignAdamW([{"params": [score], "sign": True}, {"params": [weight]}])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    score.grad, weight.grad = torch.ones(2), torch.ones(2, 2)
    optimizer.step()
    assert calls == ["before", "after"]
    assert weight.detach().all()


def test_groups_can_be_added_later():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SignAdamW([p], lr=0.5)
    optimizer.add_param_group({"params": [q], "sign": True})
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert q.item() == -0.5
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[q]) == {"step", "largest"}


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
    rounded = round_stochastically(values, dtype, rounding_noise(values, dtype, torch.Generator().manual_seed(0)))
    assert rounded.dtype == dtype
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    assert (rounded.float() - values).abs().max() <= step
    assert (rounded.float().mean(0) - values[0]).abs().max() < step / 30
    exact = values.to(dtype)
    assert torch.equal(round_stochastically(exact.float(), dtype, rounding_noise(exact, dtype)), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_stay_what_they_are(dtype):
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(
        round_stochastically(values, dtype, rounding_noise(values, dtype)).float().nan_to_num(7.0),
        values.nan_to_num(7.0),
    )


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


@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16"])
def test_steps_within_the_backward_pass_are_the_same_and_leave_no_gradient(scores_dtype):
    def train(in_backward):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
        fields = {"target_modules": ["0"], "modules_to_save": ["2"], "scores_dtype": scores_dtype}
        model = get_peft_model(layers, MaskConfig(**fields))
        optimizer = create_mask_optimizer(model)
        if in_backward:
            optimizer.step_in_backward()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        generator = torch.Generator().manual_seed(1)
        for step in range(10):
            if step == 5:  # as in a resume, which makes new groups
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            (model(torch.randn(4, 20, generator=generator)) - 1).square().mean().backward()
            scores = model.base_model.model[0].peft_mask_scores["default"]
            assert (scores.grad is None) is in_backward
            assert model.base_model.model[2].modules_to_save["default"].weight.grad is not None
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    usual, within = train(False), train(True)
    assert len(usual) == 3
    assert all(torch.equal(usual[name], within[name]) for name in usual)


def test_several_processes_do_not_step_within_the_backward_pass(monkeypatch):
    optimizer = SignAdamW([{"params": [nn.Parameter(torch.zeros(1))], "sign": True}])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="cannot step in the backward pass of 2 processes"):
        optimizer.step_in_backward()


def test_pieces_of_matrices_are_refused():
    def optimizer_of(*parameters):
        return SignAdamW([{"params": list(parameters), "sign": True}, {"params": [nn.Parameter(torch.zeros(3))]}])

    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer_of(*parameters).step()
    zero = optimizer_of(*parameters)
    zero.param_groups[0]["params"] = [nn.Parameter(torch.zeros(4))]  # as ZeRO does: of two processes, half of both
    with pytest.raises(RuntimeError, match=r"pieces of them, as FSDP1 and DeepSpeed ZeRO .* Use DDP or FSDP2"):
        zero.step()
    fsdp = optimizer_of(*parameters)
    parameters[0]._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="cannot take sign steps"):
        fsdp.step()


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_optimizers_of_bitsandbytes_train_scores(name):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(200, 300)), MaskConfig(target_modules=["0"]))
    optimizer = create_mask_optimizer(model, getattr(bitsandbytes.optim, name))
    for _ in range(5):
        model(torch.randn(4, 200)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8
    assert int((~model.base_model.model[0].mask("default")).sum()) == 300


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
