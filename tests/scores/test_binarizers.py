"""Every rule that makes a mask of scores: what it keeps, and that its masks live as those of any other rule."""

import itertools
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_mask import (
    MaskConfig,
    Masks,
    create_mask_optimizer,
    hotswap_adapter,
    keep_scores,
    spend_budget,
    training_memory,
)
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.scores.binarize import binarize_bernoulli, binarize_groups, bounded
from peft_mask.tensors.noise import uniform_like
from tests.tiny_models import tiny_inputs, tiny_model

BINARIZERS = {
    "topk": {"target_sparsity": 0.2, "candidates": 0.5},
    "threshold": {"binarizer": "threshold", "candidates": None, "init_margin": 0.002},
    "sign": {"binarizer": "sign", "candidates": 0.5, "init_margin": 0.002},
    "bernoulli": {"binarizer": "bernoulli", "candidates": None, "init_sparsity": 0.49},
    "n:m": {"binarizer": "n:m", "candidates": None, "init_margin": 0.002},
    "rows": {"structure": "row", "target_sparsity": 0.2, "candidates": None},
    "columns": {"structure": "column", "target_sparsity": 0.3, "candidates": None},
    "heads": {"structure": "head", "head_size": 4, "target_sparsity": 0.3, "candidates": None},
    "matrix": {"structure": "matrix", "binarizer": "bernoulli", "candidates": None, "init_sparsity": 0.499},
    "biases": {"target_sparsity": 0.2, "candidates": 0.5, "mask_biases": True},
    "1:2": {"binarizer": "n:m", "pattern": "1:2", "candidates": None, "init_margin": 0.002},
}


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


def masked(name, **fields):
    return get_peft_model(mlp(), MaskConfig(**{"target_modules": ["0", "2"], "seed": 0} | BINARIZERS[name] | fields))


def layers(model):
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, MaskLayer)}


def train(model, steps=6, seed=0):
    optimizer = create_mask_optimizer(model.train(), mask_lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# ---- life of an adapter, whatever the rule ----

may_die = pytest.mark.filterwarnings("ignore:every weight of")  # training here is toward an output of zero


@may_die
@pytest.mark.parametrize("name", BINARIZERS)
def test_a_mask_of_any_rule_is_trained_saved_loaded_merged_and_swapped(name, tmp_path):
    model = train(masked(name))
    x = torch.randn(3, 12)
    output = model(x)
    started = {key: layer.mask("default") for key, layer in layers(masked(name)).items()}
    masks = {key: layer.mask("default") for key, layer in layers(model).items()}
    assert any(not torch.equal(mask, started[key]) for key, mask in masks.items()), "training has changed the mask"
    model.save_pretrained(tmp_path / "one")
    assert all(torch.equal(Masks.load(tmp_path / "one")[key], mask) for key, mask in masks.items())

    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "one")
    assert torch.equal(loaded(x), output)
    assert torch.equal(loaded.train()(x), output), "nothing is drawn of a mask in use"
    before = [layer.base_layer.weight.clone() for layer in layers(loaded).values()]
    loaded.merge_adapter()
    assert torch.equal(loaded(x), output)
    loaded.unmerge_adapter()
    assert all(
        torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers(loaded).values(), before, strict=True)
    )

    other = train(masked(name), seed=1)
    other.save_pretrained(tmp_path / "two")
    hotswap_adapter(loaded, tmp_path / "two", "default")
    assert torch.equal(loaded(x), other(x))


@may_die
@pytest.mark.parametrize("name", BINARIZERS)
def test_a_checkpoint_trains_on_to_the_bit(name, tmp_path):
    model = train(masked(name))
    keep_scores(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    for key, layer in layers(loaded).items():
        assert torch.equal(layer.peft_mask_scores["default"], layers(model)[key].peft_mask_scores["default"])
    train(model, seed=1), train(loaded, seed=1)
    for key, layer in layers(loaded).items():
        assert torch.equal(layer.peft_mask_scores["default"], layers(model)[key].peft_mask_scores["default"])


@may_die
@pytest.mark.parametrize("name", BINARIZERS)
def test_a_mask_without_scores_is_trained_on_from_itself(name, tmp_path):
    model = train(masked(name))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds masks without scores: every score restarts at init_margin"):
        loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    for key, layer in layers(loaded).items():
        assert torch.equal(layer.mask("default"), layers(model)[key].mask("default"))
    train(loaded)


@pytest.mark.parametrize("name", BINARIZERS)
def test_masks_of_any_rule_vote(name):
    model = train(masked(name))
    model.add_adapter("b", MaskConfig(**{"target_modules": ["0", "2"], "init_weights": False} | BINARIZERS[name]))
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both")
    for layer in layers(model).values():
        assert torch.equal(layer.mask("both"), layer.mask("default") & layer.mask("b"))


# ---- N:M ----


@given(
    st.lists(st.integers(-2, 2), min_size=48, max_size=48),
    st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 6), (5, 12), (10, 24)]),
)
def test_of_each_group_the_highest_are_kept_the_first_of_equals(values, pattern):
    kept, size = pattern
    mask = binarize_groups(torch.tensor(values, dtype=torch.float32).view(2, 24), kept, size).flatten().tolist()
    for start in range(0, 48, size):
        group = values[start : start + size]
        best = sorted(range(size), key=lambda i: (-group[i], i))[:kept]
        assert [i for i in range(size) if mask[start + i]] == sorted(best)


@pytest.mark.parametrize(
    ("base", "dimension"), [(nn.Linear(8, 6), 1), (Conv1D(6, 8), 0), (nn.Conv2d(8, 3, 3), 1)], ids=str
)
def test_groups_lie_along_the_inputs_and_the_largest_weights_are_kept_at_the_start(base, dimension):
    model = get_peft_model(nn.Sequential(base), MaskConfig(target_modules=["0"], binarizer="n:m", candidates=None))
    mask = model.base_model.model[0].mask("default").movedim(dimension, -1).unflatten(-1, (-1, 4))
    assert (mask.sum(-1) == 2).all()
    magnitude = base.weight.detach().abs().movedim(dimension, -1).unflatten(-1, (-1, 4))
    assert (magnitude.masked_fill(~mask, 9).amin(-1) >= magnitude.masked_fill(mask, 0).amax(-1)).all()


def test_a_2_4_mask_takes_two_thirds_of_a_bit_a_weight(tmp_path):
    base = nn.Sequential(nn.Linear(384, 96))
    config = MaskConfig(target_modules=["0"], binarizer="n:m", candidates=None, init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    (record,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert 8 * (len(record) - 60) / (384 * 96) < 0.668


def test_what_has_no_groups_is_refused_before_anything_changes():
    config = MaskConfig(target_modules=["0", "2"], binarizer="n:m", pattern="5:16", candidates=None)
    base = mlp()
    with pytest.raises(ValueError, match="cannot mask '0' with pattern='5:16': its 12 inputs are not groups of 16"):
        get_peft_model(base, config)
    assert type(base[0]) is nn.Linear
    with pytest.raises(
        ValueError, match=r"cannot mask '0' with pattern='2:4': which of its dimensions are inputs is not known"
    ):
        get_peft_model(
            nn.Sequential(nn.Embedding(8, 8)), MaskConfig(target_modules=["0"], binarizer="n:m", candidates=None)
        )


def test_a_combination_that_is_no_n_m_mask_cannot_be_trained_on(tmp_path):
    model = masked("n:m", init_weights=False)
    model.add_adapter("b", MaskConfig(**{"target_modules": ["0", "2"], "init_weights": False} | BINARIZERS["n:m"]))
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    PeftModel.from_pretrained(mlp(), tmp_path / "both")
    with pytest.raises(ValueError, match="mask of '0' on: it is not of the kind that pattern='2:4' in the adapter's"):
        PeftModel.from_pretrained(mlp(), tmp_path / "both", is_trainable=True)


# ---- Bernoulli ----


def test_a_weight_is_kept_as_often_as_its_score_says():
    scores = torch.linspace(-4, 4, 9)
    drawn = torch.stack([binarize_bernoulli(scores.repeat(2000), key) for key in range(3)]).view(-1, 9)
    torch.testing.assert_close(drawn.float().mean(0), scores.sigmoid(), atol=0.02, rtol=0)


def test_a_mask_stays_until_the_scores_change_and_is_another_in_each_layer_and_seed():
    def mask(layer):
        return layer._scores_in_force("default")[1]

    model = masked("bernoulli").train()
    first = {key: mask(layer) for key, layer in layers(model).items()}
    model(torch.randn(3, 12))
    torch.rand(5)
    model.eval()(torch.randn(3, 12))
    model.train()
    assert all(torch.equal(mask(layer), first[key]) for key, layer in layers(model).items())
    again = layers(masked("bernoulli").train())
    assert all(torch.equal(mask(layer), first[key]) for key, layer in again.items())
    other = layers(masked("bernoulli", seed=1).train())
    assert not any(torch.equal(mask(layer), first[key]) for key, layer in other.items())
    train(model).train()
    assert not any(torch.equal(mask(layer), first[key]) for key, layer in layers(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_is_uniform_and_independent_between_neighbors_keys_and_values(dtype):
    values = torch.randn(300, 400).to(dtype)
    changed = values.clone()
    changed[7, 7] += 1
    streams = [uniform_like(values, 3), uniform_like(values, 4), uniform_like(changed, 3)]
    flat = torch.stack([s.flatten()[:-1] for s in streams] + [streams[0].flatten()[1:]])
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.02
    for stream in streams:
        assert stream.dtype == torch.float32
        assert 0 <= stream.min() < 1e-3 < 0.999 < stream.max() < 1
        counts = torch.histc(stream, 64, 0, 1)
        assert ((counts - counts.mean()).square() / counts.mean()).sum() < 110, "chi-square, 63 degrees of freedom"


def test_noise_is_what_its_definition_says_in_integers_without_bounds():
    def mixed(x):
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    values, key = [1.0, -2.0, 0.5, 3e-5, -7e20], 2**32 - 5
    total = sum(struct.unpack("<i", struct.pack("<f", value))[0] for value in values) % 2**32
    seed = mixed(total) ^ key
    start = mixed(seed)
    stride = mixed((start + 1) % 2**32) | 1
    expected = [(mixed((i * stride + start) % 2**32) >> 8) / 2**24 for i in range(5)]
    assert uniform_like(torch.tensor(values), key).tolist() == expected


def test_nothing_is_drawn_around_a_base_in_evaluation():
    model = get_peft_model(mlp().eval(), MaskConfig(target_modules=["0"], binarizer="bernoulli", init_sparsity=0.4))
    x = torch.randn(3, 12)
    assert torch.equal(model(x), mlp()(x))
    assert not torch.equal(model.train()(x), mlp()(x))


def test_a_layer_that_draws_is_one_graph():
    model = masked("bernoulli").train()
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    x = torch.randn(3, 12)
    assert torch.equal(compiled(x), model(x))


# ---- sign ----


def test_scores_stay_within_their_bounds_under_any_optimizer():
    for optimizer_cls, most in ((torch.optim.SGD, 1.5), (torch.optim.Adam, 2.0)):
        model = masked("sign", init_margin=0.5, candidates=None)
        parameters = [layer.peft_mask_scores["default"] for layer in layers(model).values()]
        assert all(p.abs().max() <= 1 for p in parameters)
        optimizer = optimizer_cls(parameters, lr=0.1)
        model.train()
        x = torch.randn(8, 12)
        for _ in range(60):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        reached = max(p.abs().max().item() for p in parameters)
        assert reached > 0.99
        if optimizer_cls is torch.optim.Adam:
            assert reached < most


@pytest.mark.parametrize(("score", "grad"), list(itertools.product([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5], [-2.0, 2.0])))
def test_only_gradients_that_lead_out_of_the_bounds_are_stopped(score, grad):
    scores = torch.tensor([score], requires_grad=True)
    output = bounded(scores)
    assert output.item() == score
    output.backward(torch.tensor([grad]))
    leads_out = abs(score) >= 1 and (score > 0) == (grad < 0)
    assert scores.grad.item() == (0.0 if leads_out else grad)


# ---- scores of one's own ----


def test_scores_are_set_by_a_function_of_name_and_weight():
    model = masked("threshold")
    parameters = [layer.peft_mask_scores["default"] for layer in layers(model).values()]
    model.base_model.set_scores(lambda name, weight: weight.abs() - (0.2 if name == "0" else 0.1))
    for (key, layer), parameter in zip(layers(model).items(), parameters, strict=True):
        assert layer.peft_mask_scores["default"] is parameter
        assert torch.equal(layer.mask("default"), layer.base_layer.weight.abs() >= (0.2 if key == "0" else 0.1))


def test_scores_are_set_by_tensors_of_all_weights_or_of_the_candidates():
    model = masked("topk")
    dense = {key: torch.randn(layer.mask_shape) for key, layer in layers(model).items()}
    model.base_model.set_scores(dense)
    for key, layer in layers(model).items():
        expected = dense[key].flatten()[layer.positions("default").long()]
        assert torch.equal(layer.peft_mask_scores["default"], expected)
    sparse = {key: torch.randn(layer.peft_mask_scores["default"].shape) for key, layer in layers(model).items()}
    model.base_model.set_scores(sparse)
    assert all(torch.equal(layer.peft_mask_scores["default"], sparse[key]) for key, layer in layers(model).items())


def test_scores_that_cannot_be_are_refused_and_nothing_changes():
    model = masked("topk")
    good = {key: torch.randn(layer.mask_shape) for key, layer in layers(model).items()}
    before = {key: layer.peft_mask_scores["default"].clone() for key, layer in layers(model).items()}
    for bad, message in (
        ({"0": good["0"]}, r"the scores of 'default': they are for other modules than it masks. Missing: \['2'\]"),
        (
            good | {"2": good["2"].t()},
            r"the scores of '2': expected a floating tensor of shape \(8, 20\) or \(80,\), got",
        ),
        (good | {"2": good["2"].long()}, r"the scores of '2': expected .* got torch.int64 of shape \(8, 20\)"),
        (good | {"2": good["2"] / 0}, "cannot set the scores of '2': 160 are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.base_model.set_scores(bad)
    assert all(torch.equal(layer.peft_mask_scores["default"], before[key]) for key, layer in layers(model).items())


# ---- structure ----


@pytest.mark.parametrize("name", ["rows", "columns", "heads", "matrix"])
def test_masks_with_structure_are_of_whole_units_and_scores_one_a_unit(name):
    model = masked(name, init_weights=False)
    for key, layer in layers(model).items():
        outputs, inputs = layer.mask_shape
        expected = {"rows": (outputs, 1), "columns": (1, inputs), "heads": (outputs // 4, 1), "matrix": (1, 1)}[name]
        assert layer.peft_mask_scores["default"].shape == expected
        mask = layer.mask("default")
        if name == "rows":
            assert torch.equal(mask, mask[:, :1].expand(outputs, inputs))
            assert int((~mask[:, 0]).sum()) == round(0.2 * outputs)
        elif name == "columns":
            assert torch.equal(mask, mask[:1].expand(outputs, inputs))
        elif name == "heads":
            assert torch.equal(mask, mask[::4, :1].repeat_interleave(4, 0).expand(outputs, inputs))
            assert int((~mask[:, 0]).sum()) == 4 * max(1, round(0.3 * outputs / 4))
        else:
            assert mask.all() or not mask.any()
        assert key in ("0", "2")


def test_rows_are_outputs_however_the_weight_is_stored():
    fields = {"target_modules": ["0"], "candidates": None, "init_weights": False, "target_sparsity": 0.5}
    for structure, off in (("row", 0), ("column", 1)):
        model = get_peft_model(nn.Sequential(Conv1D(6, 8)), MaskConfig(structure=structure, **fields))
        mask = model.base_model.model[0].mask("default")  # (8 inputs, 6 outputs)
        along = mask.all(off)
        assert along.any()
        assert not along.all()
        assert torch.equal(mask, along.unsqueeze(off).expand(8, 6))
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), MaskConfig(structure="row", **fields))
    filters = model.base_model.model[0].mask("default").flatten(1)
    assert torch.equal(filters, filters[:, :1].expand(6, 36))
    assert int((~filters[:, 0]).sum()) == 3


def test_heads_are_the_models_own(tmp_path):
    config = MaskConfig(
        target_modules=["query", "key", "value"],
        structure="head",
        candidates=None,
        target_sparsity=0.5,
        init_weights=False,
    )
    model = get_peft_model(tiny_model("bert", "base"), config)
    assert config.head_size == 16
    for layer in layers(model).values():
        assert layer.peft_mask_scores["default"].shape == (2, 1)
        off = ~layer.mask("default")
        assert off[:16].all() != off[16:].all()
        assert int(off.sum()) == 16 * 32
    model.save_pretrained(tmp_path)
    for record in load_file(tmp_path / "adapter_model.safetensors").values():
        assert len(record) == 60 + 9 + 1, "one byte for two heads, beside the frame and the shape of a block"
    loaded = PeftModel.from_pretrained(tiny_model("bert", "base"), tmp_path)
    inputs = tiny_inputs(model.get_base_model())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, model.eval()(**inputs).last_hidden_state)


def test_a_checkpoint_of_rows_is_loaded_while_their_budget_grows(tmp_path):
    model = train(masked("rows", target_sparsity=0.6))
    spend_budget(model, 0.5)
    keep_scores(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert int((~layers(model)["0"].mask("default")[:, 0]).sum()) == 6
    spend_budget(loaded, 0.5)
    for key, layer in layers(loaded).items():
        assert torch.equal(layer.mask("default"), layers(model)[key].mask("default"))


def test_small_blocks_are_the_first_to_go_in_a_magnitude_start():
    base = nn.Sequential(nn.Linear(6, 10))
    with torch.no_grad():
        base[0].weight.mul_(torch.arange(10).unsqueeze(1).roll(3, 0))
    order = base[0].weight.detach().square().sum(1).argsort()
    fields = {"target_modules": ["0"], "structure": "row", "candidates": None, "binarizer": "threshold"}
    model = get_peft_model(base, MaskConfig(init_weights="magnitude", init_sparsity=0.3, **fields))
    off = ~model.base_model.model[0].mask("default")[:, 0]
    assert set(off.nonzero().flatten().tolist()) == set(order[:3].tolist())


def test_units_that_a_weight_does_not_have_are_refused_before_anything_changes():
    base = mlp()
    fields = {"target_modules": ["0", "2"], "structure": "head", "candidates": None}
    for more, message in (
        ({}, "cannot mask '0' with structure='head': the size of its attention heads is not known: set head_size"),
        ({"head_size": 5}, "cannot mask '2' with structure='head': its 8 outputs are not heads of 5"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, MaskConfig(**fields, **more))
        assert type(base[0]) is nn.Linear
    config = MaskConfig(target_modules=["0"], structure="row", candidates=None)
    with pytest.raises(
        ValueError, match="'0' with structure='row': which of its dimensions are inputs is not known, so it"
    ):
        get_peft_model(nn.Sequential(nn.Embedding(5, 4)), config)


def test_training_memory_counts_units():
    model = nn.Sequential(nn.Linear(64, 96))
    x = {"input": torch.randn(2, 64)}
    few, many = (
        training_memory(model, MaskConfig(target_modules=["0"], candidates=None, structure=structure), x)
        for structure in ("row", "weight")
    )
    assert few.scores == 4 * 96
    assert many.scores == 4 * 96 * 64
