"""Scores for some weights only: which, what the layer computes, that nothing is lost on the way to disk and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask import MaskConfig, create_mask_optimizer, keep_scores, saliency_candidates
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.scores.binarize import binarize_topk
from peft_mask.scores.candidates import by_preference, choose_candidates
from peft_mask.scores.functional import masked_linear, masked_linear_reference

FIELDS = {"target_modules": ["0", "2"], "target_sparsity": 0.05, "candidates": 0.25}


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).to(dtype)


def masked(dtype=torch.float32, **fields):
    return get_peft_model(mlp(dtype), MaskConfig(**(FIELDS | fields)))


def layers(model, adapter="default"):
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, MaskLayer)}


def train(model, steps=5, seed=0, **optimizer):
    optimizer = create_mask_optimizer(model, **optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ---- the rule ----


@given(st.lists(st.integers(-3, 3), max_size=30), st.integers(0, 35))
def test_topk_switches_off_exactly_so_many_of_the_lowest_the_first_of_equals(values, zeros):
    scores = torch.tensor(values, dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    off = {i for i in order[:zeros] if values[i] < 0}
    assert {i for i, kept in enumerate(binarize_topk(scores, zeros).tolist()) if not kept} == off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_learning_rate_does_not_change_a_topk_mask(dtype):
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = binarize_topk(scores, 60)
    assert int((~mask).sum()) == 60
    for factor in (2.0**-7, 2.0**9):
        assert torch.equal(binarize_topk(scores * factor, 60), mask)


def test_nan_scores_switch_nothing_off_by_themselves():
    scores = torch.tensor([float("nan"), -1.0, float("nan"), -2.0])
    assert binarize_topk(scores, 3).tolist() == [True, False, True, False]
    assert binarize_topk(torch.full((4,), float("nan")), 2).all()


# ---- the choice ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_in_magnitude_are_candidates(dtype):
    weight = torch.randn(30, 20).to(dtype)
    positions = choose_candidates(weight, MaskConfig(candidates=0.1), "layer")
    assert positions.dtype == torch.int32
    assert len(positions) == 60
    assert (positions.diff() > 0).all()
    rest = torch.ones(600, dtype=torch.bool)
    rest[positions.long()] = False
    magnitude = weight.abs().view(-1)
    assert magnitude[positions.long()].min() >= magnitude[rest].max()


def test_random_candidates_come_from_the_seed():
    config = MaskConfig(candidate_rule="random", seed=3)
    weight = torch.randn(30, 20)
    first = choose_candidates(weight, config, "a")
    assert torch.equal(first, choose_candidates(weight * 2, config, "a"))
    assert not torch.equal(first, choose_candidates(weight, config, "b"))


def test_what_must_be_among_the_candidates_is():
    preference = torch.arange(10.0)
    assert by_preference(preference, 3, torch.tensor([0, 4])).tolist() == [0, 4, 9]
    with pytest.raises(ValueError, match="it switches off 4 weights, but only 3 are candidates"):
        by_preference(preference, 3, torch.arange(4))


def test_saliency_is_the_gradient_of_the_mask_over_the_batches():
    model = masked()
    batches = [torch.randn(8, 12) for _ in range(3)]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    positions = saliency_candidates(model, batches, lambda x: model(x).square().mean())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = mlp()
    for x in batches:
        plain(x).square().mean().backward()
    for name, found in positions.items():
        weight = plain[int(name)].weight
        expected = (weight * weight.grad).abs().view(-1)
        assert torch.equal(found.sort().values, expected.topk(len(found)).indices.sort().values)
    model.base_model.set_candidates(positions)
    for name, layer in layers(model).items():
        assert torch.equal(layer.positions("default").long(), positions[name].sort().values.long())


def test_choosing_again_in_training_leaves_the_mask_as_it_is():
    model = train(masked(candidate_rule="random", seed=0))
    before = {name: layer.mask("default") for name, layer in layers(model).items()}
    assert not before["0"].all()
    positions = saliency_candidates(model, [torch.randn(8, 12)], lambda x: model(x).square().mean())
    model.base_model.set_candidates(positions)
    for name, layer in layers(model).items():
        assert torch.equal(layer.mask("default"), before[name])


def test_saliency_without_candidates_is_refused():
    model = masked(candidates=None)
    with pytest.raises(ValueError, match="'default' has no candidates to choose: set candidates in MaskConfig"):
        saliency_candidates(model, [], lambda x: model(x).sum())


def test_new_candidates_start_at_zero_and_old_ones_keep_their_score():
    model = masked()
    layer = layers(model)["0"]
    scores, positions = layer.peft_mask_scores["default"], layer.positions("default").clone().long()
    with torch.no_grad():
        scores.copy_(torch.arange(1.0, 1 + len(scores)))
    known = dict(zip(positions.tolist(), scores.tolist(), strict=True))
    fresh = torch.tensor([p for p in range(240) if p not in known][:10])
    chosen = torch.cat([positions[10:].flip(0), fresh])
    others = layers(model)["2"].positions("default")
    model.base_model.set_candidates({"0": chosen, "2": others})
    assert layer.peft_mask_scores["default"] is scores
    for position, score in zip(layer.positions("default").tolist(), scores.tolist(), strict=True):
        assert score == known.get(position, 0.0)


def test_candidates_that_cannot_be_are_refused_and_nothing_changes():
    model = masked()
    good = {name: layer.positions("default").clone() for name, layer in layers(model).items()}
    set_candidates = model.base_model.set_candidates
    with pytest.raises(ValueError, match=r"other modules than it masks. Missing: \['2'\]; not masked: \['1'\]"):
        set_candidates({"0": good["0"], "1": good["2"]})
    for bad in (good["2"][:-1], good["2"].float(), good["2"] - 1000, good["2"] * 0):
        with pytest.raises(ValueError, match=r"cannot set the candidates of '2': expected 25 distinct integers from 0"):
            set_candidates({"0": good["0"] * 0 + torch.arange(60), "2": bad})
    for name, layer in layers(model).items():
        assert torch.equal(layer.positions("default"), good[name])
    with pytest.raises(ValueError, match="every weight of '0' has a score"):
        masked(candidates=None).base_model.set_candidates(good)


# ---- the layer ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_equals_its_reference_in_value_and_every_gradient(transposed, sparse, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 7, generator=generator).to(dtype)
    weight = torch.randn((7, 5) if transposed else (5, 7), generator=generator).to(dtype)
    bias = torch.randn(5, generator=generator).to(dtype)
    positions = torch.tensor([0, 3, 4, 11, 20, 34], dtype=torch.int32) if sparse else None
    scores = torch.randn(6 if sparse else weight.shape, generator=generator)
    mask = binarize_topk(scores, 3)
    results = []
    for function in (masked_linear, masked_linear_reference):
        inputs = [t.clone().requires_grad_() for t in (x, weight, scores, bias)]
        y = function(*inputs, mask, positions, transposed=transposed)
        y.backward(torch.ones_like(y))
        results.append([y, *(t.grad for t in inputs)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_scores_of_candidates_get_the_entries_of_the_dense_gradient():
    x, weight = torch.randn(6, 7), torch.randn(5, 7)
    positions = torch.tensor([1, 8, 30])
    few, all_scores = torch.zeros(3, requires_grad=True), torch.zeros(5, 7, requires_grad=True)
    masked_linear(x, weight, few, None, None, positions).square().sum().backward()
    masked_linear(x, weight, all_scores).square().sum().backward()
    assert torch.equal(few.grad, all_scores.grad.view(-1)[positions])


@pytest.mark.parametrize("candidates", [0.25, None])
@pytest.mark.parametrize("base", [nn.Linear(12, 20), Conv1D(20, 12)])
def test_the_budget_is_met_exactly_and_merging_gives_the_same_output(candidates, base):
    model = get_peft_model(
        nn.Sequential(base), MaskConfig(**(FIELDS | {"target_modules": ["0"], "candidates": candidates}))
    )
    weight = base.weight.clone()
    x = torch.randn(3, 12)
    assert torch.equal(model(x), base(x)), "every weight is kept at the start"
    train(model)
    layer = layers(model)["0"]
    mask = layer.mask("default")
    assert int((~mask).sum()) == 12
    output = model(x)
    assert not torch.equal(output, base(x))
    model.merge_adapter()
    assert torch.equal(base.weight, torch.where(mask, weight, 0))
    assert torch.equal(model(x), output)
    model.unmerge_adapter()
    assert torch.equal(base.weight, weight)


def test_two_adapters_in_training_are_the_product_of_their_masks():
    model = masked(init_weights=False, seed=0)
    model.add_adapter("b", MaskConfig(**(FIELDS | {"init_weights": False, "seed": 1, "candidates": None})))
    model.base_model.set_adapter(["default", "b"])
    x = torch.randn(3, 12)
    y = model(x)
    y.sum().backward()
    both = {name: layer.mask("default") & layer.mask("b") for name, layer in layers(model).items()}
    plain = mlp()
    with torch.no_grad():
        for name, mask in both.items():
            plain[int(name)].weight.mul_(mask)
    torch.testing.assert_close(y, plain(x))
    for layer in layers(model).values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.peft_mask_scores.values())


def test_memory_of_scores_gradients_and_state_is_that_of_the_candidates():
    model = masked()
    for layer in layers(model).values():
        scores = layer.peft_mask_scores["default"]
        assert scores.numel() == round(0.25 * layer.base_layer.weight.numel())
    optimizer = create_mask_optimizer(model)
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert all(value.numel() == 1 for state in optimizer.state.values() for value in state.values())
    assert all(p.grad is None for name, p in model.named_parameters() if "scores" not in name)


# ---- the disk ----


def test_a_mask_of_candidates_is_saved_as_any_other(tmp_path):
    model = train(masked()).eval()
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.peft_mask_bits" for name in "02"
    }
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert "positions" not in "".join(loaded.state_dict())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_scores_and_candidates_come_back_exactly(tmp_path, low_cpu_mem_usage):
    model = masked(candidate_rule="random", seed=0)
    positions = saliency_candidates(model, [torch.randn(8, 12)], lambda x: model(x).square().mean())
    model.base_model.set_candidates(positions)
    train(model)
    keep_scores(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, layer in layers(loaded).items():
        twin = layers(model)[name]
        assert torch.equal(layer.positions("default"), twin.positions("default"))
        assert torch.equal(layer.peft_mask_scores["default"], twin.peft_mask_scores["default"])
    train(model, seed=1), train(loaded, seed=1)
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), model(x))


def test_training_on_from_bits_keeps_the_mask_and_says_what_is_lost(tmp_path):
    model = train(masked(candidate_rule="random", seed=0))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds masks without scores"):
        loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    for name, layer in layers(loaded).items():
        assert torch.equal(layer.mask("default"), layers(model)[name].mask("default"))
        assert layer.peft_mask_scores["default"].numel() == layers(model)[name].peft_mask_scores["default"].numel()


@pytest.mark.parametrize("change", ["drop", "reverse", "beyond", "float"])
def test_malformed_candidates_are_refused(tmp_path, change):
    model = train(masked())
    keep_scores(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.0.peft_mask_positions"
    positions = tensors.pop(key)
    if change != "drop":
        changes = {"reverse": positions.flip(0), "beyond": positions + 240, "float": positions.float()}
        tensors[key] = changes[change].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"scores of '0': which weights they belong to is missing or malformed"):
        PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)


def test_a_mask_of_more_zeros_than_candidates_cannot_be_trained_on(tmp_path):
    model = train(masked(target_sparsity=0.2), mask_lr=1.0)
    config = model.peft_config["default"]
    config.candidates, config.target_sparsity = 0.1, 0.05
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot train the mask of '0' on: it switches off [0-9]+ weights, but only 24"
    ):
        PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
