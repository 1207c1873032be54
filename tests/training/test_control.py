"""What steers scores beside the loss: that targets are reached, and that nothing has to be remembered for it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mask import (
    DecayTowardKept,
    GradientDropout,
    HoldSparsity,
    MaskCallback,
    MaskConfig,
    Masks,
    MaskStatistics,
    SparsityPenalty,
    create_mask_optimizer,
)
from peft_mask.layers.mask_layer import MaskLayer
from tests.training.test_training import Interrupt, masked_bert, scores, trainer

PAPER = {"binarizer": "threshold", "init_weights": "uniform", "init_sparsity": 0.05, "threshold": 0.01}
RULES = {
    "threshold": (PAPER, 3e-3),
    "all kept at the start": ({"binarizer": "threshold", "init_margin": 0.016}, 1e-3),
    "sign": ({"binarizer": "sign", "init_weights": "uniform", "init_sparsity": 0.05}, 3e-3),
    "bernoulli": ({"binarizer": "bernoulli", "init_sparsity": 0.05}, 2e-1),
    "candidates": (PAPER | {"candidates": 0.5}, 3e-3),
    "biases": (PAPER | {"mask_biases": True}, 3e-3),
}


def masked(**fields):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 4))
    return get_peft_model(base, MaskConfig(**{"target_modules": ["0", "2"], "candidates": None, "seed": 0} | fields))


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def train(model, lr, steps, before=(), after=()):
    torch.manual_seed(1)
    teacher = nn.Linear(24, 4).requires_grad_(False)
    optimizer = create_mask_optimizer(model.train(), mask_lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        x = torch.randn(32, 24)
        nn.functional.cross_entropy(model(x), teacher(x).argmax(-1)).backward()
        for call in before:
            call(model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for call in after:
            call(model)
    return MaskStatistics(model)(model)["sparsity"]


# ---- sparsity ----


@pytest.mark.parametrize(("name", "target"), [*((name, 0.1) for name in RULES), ("threshold", 0.02), ("sign", 0.02)])
def test_a_penalty_reaches_its_target(name, target):
    fields, lr = RULES[name]
    near = 0.005 if name == "bernoulli" else 0.002  # draws differ with the last bit of a score, and so between CPUs
    assert train(masked(**fields), lr, 150, before=[SparsityPenalty(target)]) == pytest.approx(target, abs=near)


def test_without_the_penalty_sparsity_goes_elsewhere():
    fields, lr = RULES["threshold"]
    assert train(masked(**fields), lr, 150) > 0.05, "0.02 is not where it goes by itself"


def test_the_gradient_added_is_that_of_the_formula():
    model = masked(**PAPER)
    model(torch.randn(8, 24)).square().sum().backward()
    parameters = [layer.peft_mask_scores["default"] for layer in layers(model)]
    loss_grads = [p.grad.clone() for p in parameters]
    SparsityPenalty(0.2, weight=7.0)(model)

    count = sum(p.numel() for p in parameters)
    size = sum(grad.abs().sum() for grad in loss_grads) / count
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    through = [(s < 0).float() - (s - s.detach()) for s in copies]  # forward what is off, backward -1
    sparsity = sum(value.sum() for value in through) / count
    (7.0 / 2 * (0.2 - sparsity).square() * count * size).backward()
    for parameter, before, copy in zip(parameters, loss_grads, copies, strict=True):
        torch.testing.assert_close(parameter.grad - before, copy.grad, rtol=1e-3, atol=1e-6)
        assert copy.grad.min() > 0, "too few are off: a step against the gradient lowers scores"


def test_of_rows_the_penalty_counts_the_weights():
    model = masked(**PAPER, structure="row")
    model(torch.randn(8, 24)).square().sum().backward()
    first, second = layers(model)
    with torch.no_grad():
        for layer, off in ((first, 24), (second, 16)):  # a quarter of the rows, and so of the weights, of each
            layer.peft_mask_scores["default"].fill_(1.0)[:off] = -1.0
    before = [layer.peft_mask_scores["default"].grad.clone() for layer in (first, second)]
    SparsityPenalty(0.25)(model)
    for layer, grad in zip((first, second), before, strict=True):
        torch.testing.assert_close(layer.peft_mask_scores["default"].grad, grad)


def test_the_penalty_means_the_same_whatever_the_scale_of_the_loss():
    pulls = []
    for scale in (1.0, 1e-4):
        model = masked(**PAPER)
        (scale * model(torch.ones(8, 24)).square().sum()).backward()
        grads = [layer.peft_mask_scores["default"].grad for layer in layers(model)]
        before = torch.cat([grad.flatten() for grad in grads])
        SparsityPenalty(0.3)(model)
        pulls.append((torch.cat([grad.flatten() for grad in grads]) - before) / scale)
    torch.testing.assert_close(*pulls, rtol=1e-3, atol=1e-6)


def test_the_whole_models_sparsity_is_held_exactly_and_training_says_where(tmp_path):
    model = masked(**PAPER)
    weights = sum(layer.mask_shape.numel() for layer in layers(model))
    seen = []

    def count(model):
        seen.append(sum(int((~layer.mask("default")).sum()) for layer in layers(model)))

    train(model, 3e-3, 40, after=[HoldSparsity(0.1), count])
    assert seen == [round(0.1 * weights)] * 40
    shares = [float((~layer.mask("default")).float().mean()) for layer in layers(model)]
    assert abs(shares[0] - shares[1]) > 0.005, "each matrix has a sparsity of its own"
    model.save_pretrained(tmp_path)
    assert Masks.load(tmp_path).sparsity == pytest.approx(0.1, abs=1e-4)
    loaded = PeftModel.from_pretrained(masked(**PAPER).unload(), tmp_path)
    for one, other in zip(layers(loaded), layers(model), strict=True):
        assert torch.equal(one.mask("default"), other.mask("default"))


def test_holding_shifts_all_scores_alike():
    model = masked(**PAPER)
    before = [layer.peft_mask_scores["default"].detach().clone() for layer in layers(model)]
    HoldSparsity(0.2)(model)
    shifts = torch.cat(
        [
            (old - layer.peft_mask_scores["default"].detach()).flatten()
            for old, layer in zip(before, layers(model), strict=True)
        ]
    )
    assert shifts[0].abs() > 0.01
    torch.testing.assert_close(shifts, shifts[0].expand_as(shifts), rtol=0, atol=1e-6)


def test_scores_decay_toward_kept_and_never_toward_off():
    model = masked(binarizer="threshold", init_margin=0.016)
    (first, *_) = (layer.peft_mask_scores["default"] for layer in layers(model))
    with torch.no_grad():
        first.view(-1)[:3] = torch.tensor([-0.01, 0.016, 0.05])
    masks = [layer.mask("default") for layer in layers(model)]
    DecayTowardKept(0.25)(model)
    torch.testing.assert_close(first.detach().view(-1)[:3], torch.tensor([-0.0035, 0.016, 0.0415]))
    for _ in range(40):
        DecayTowardKept(0.25)(model)
    torch.testing.assert_close(first.detach(), torch.full_like(first, 0.016), rtol=0, atol=1e-4)
    assert not masks[0].all()
    assert all((layer.mask("default") >= mask).all() for layer, mask in zip(layers(model), masks, strict=True))


def test_decay_keeps_more_weights():
    fields, lr = RULES["all kept at the start"]
    free = train(masked(**fields), lr, 100)
    assert 0 < train(masked(**fields), lr, 100, after=[DecayTowardKept(0.01)]) < 0.9 * free


# ---- gradient dropout ----


def with_gradients(seed=0, **fields):
    model = masked(**fields)
    torch.manual_seed(seed)
    model(torch.randn(8, 24)).square().sum().backward()
    return model, [layer.peft_mask_scores["default"].grad for layer in layers(model)]


@pytest.mark.parametrize("fields", [{}, PAPER, {"candidates": 0.5}, {"scores_dtype": "bfloat16"}])
def test_each_gradient_is_dropped_with_its_probability_and_the_others_are_untouched(fields):
    model, grads = with_gradients(**{"init_weights": False} | fields)
    before = [grad.clone() for grad in grads]
    GradientDropout(0.3)(model)
    dropped = torch.cat([((grad == 0) & (old != 0)).flatten() for grad, old in zip(grads, before, strict=True)])
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    for grad, old in zip(grads, before, strict=True):
        assert torch.equal(grad[grad != 0], old[grad != 0])


def test_which_are_dropped_depends_on_scores_names_and_seed_but_not_on_data():
    def dropped(seed=0, data=0, moved=0.0):
        model, grads = with_gradients(data, **PAPER)
        with torch.no_grad():
            layers(model)[0].peft_mask_scores["default"][0, 0] += moved
        GradientDropout(0.5, seed)(model)
        return [grad == 0 for grad in grads]

    first = dropped()
    assert all(torch.equal(*pair) for pair in zip(first, dropped(data=1), strict=True)), "as on another process"
    assert not torch.equal(first[0], dropped(seed=1)[0])
    after_a_step = dropped(moved=1e-3)
    assert (first[0] == after_a_step[0]).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(first[0].flatten()[:1000], first[1].flatten()[:1000])


def test_a_dropped_gradient_is_no_vote():
    model, grads = with_gradients()
    GradientDropout(0.5)(model)
    zero = grads[0] == 0
    same = (grads[1].flatten()[: zero.numel()] == 0) == zero.flatten()
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.05), (
        "others in each layer, also where scores are equal"
    )
    create_mask_optimizer(model, mask_lr=0.01).step()
    moved = layers(model)[0].peft_mask_scores["default"].detach() != 0
    assert torch.equal(moved, ~zero)


# ---- in Trainer ----


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    fields = PAPER | {"candidates": None, "seed": 0}
    controls = {
        "before_step": [SparsityPenalty(0.1), GradientDropout(0.3)],
        "after_step": [DecayTowardKept(0.01), HoldSparsity(0.1)],
    }
    whole, stopped, resumed = (masked_bert(**fields) for _ in range(3))
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(whole, tmp_path / "a", MaskCallback(**controls), **saving).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(stopped, tmp_path / "b", MaskCallback(**controls), Interrupt(), **saving).train()
    trainer(resumed, tmp_path / "b", MaskCallback(**controls), **saving).train(resume_from_checkpoint=True)
    for key, value in scores(whole).items():
        assert torch.equal(value, scores(resumed)[key]), key
    assert MaskStatistics(whole)(whole)["sparsity"] == pytest.approx(0.1, abs=1e-4)


def test_a_callback_calls_before_and_after_each_step_of_the_optimizer(tmp_path):
    model, calls = masked_bert(), []

    def call(when):
        def note(given):
            assert given is model
            gradients = [p.grad for name, p in model.named_parameters() if "peft_mask_scores" in name]
            calls.append((when, float(sum(p.abs().sum() for p in scores(model).values())), gradients[0] is not None))

        return note

    trainer(
        model,
        tmp_path,
        MaskCallback(before_step=[call("before")], after_step=[call("after")]),
        max_steps=2,
        gradient_accumulation_steps=2,
    ).train()
    assert [when for when, *_ in calls] == ["before", "after"] * 2
    assert calls[0][1] == 0, "scores have not moved yet"
    assert calls[0][2]
    assert calls[1][1] == calls[2][1] > 0


# ---- refusals ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparsityPenalty(0.0), "target must be a finite number greater than 0 and less than 1"),
        (lambda: SparsityPenalty(0.1, weight=-1), "weight must be a finite number greater than 0"),
        (lambda: HoldSparsity(1.0), "sparsity must be a finite number greater than 0 and less than 1"),
        (lambda: DecayTowardKept(1.5), "rate must be a finite number greater than 0 and at most 1"),
        (lambda: GradientDropout(1.0), "probability must be a finite number greater than 0 and less than 1"),
    ],
)
def test_fields_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_they_have_no_meaning_for_is_refused():
    ranked, _ = with_gradients()
    for control in (SparsityPenalty(0.1), HoldSparsity(0.1), DecayTowardKept(0.1)):
        with pytest.raises(ValueError, match=f"{type(control).__name__} is for scores with a threshold"):
            control(ranked)
    for control in (SparsityPenalty(0.1), GradientDropout(0.1)):
        with pytest.raises(ValueError, match="call it between the backward pass and the step of the optimizer"):
            control(masked(**PAPER))
    with pytest.raises(ValueError, match='HoldSparsity is for structure="weight"'):
        HoldSparsity(0.1)(masked(**PAPER, structure="row"))
    with pytest.raises(ValueError, match=r"3379 weights are to be off, 1690 have a score. Raise candidates"):
        HoldSparsity(0.4)(masked(**PAPER | {"candidates": 0.2}))
    with pytest.raises(ValueError, match='DecayTowardKept is for scores_dtype="float32"'):
        DecayTowardKept(0.1)(masked(**PAPER, scores_dtype="bfloat16"))


def test_layers_that_got_no_gradient_are_passed_over():
    model, grads = with_gradients(**PAPER)
    layers(model)[1].peft_mask_scores["default"].grad = None
    SparsityPenalty(0.5)(model)
    GradientDropout(0.5)(model)
    assert (grads[0] == 0).any()
