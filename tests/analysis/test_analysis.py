"""The analyses: each figure against one that is known, or counted in another way."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_mask import MaskConfig, Masks, MaskStatistics, keep_scores
from peft_mask.analysis import (
    Curve,
    accuracy,
    adapter_logits,
    apply_masks,
    barrier,
    block,
    dissimilarity,
    effective_weights,
    ensemble,
    ensemble_table,
    flip_ratio,
    generalization,
    iou,
    labels_of,
    logits_of,
    magnitude_masks,
    markdown,
    masked_shapes,
    masks_of,
    movement,
    paper_config,
    pooled_states,
    principal_components,
    random_masks,
    reinitialize,
    scan,
    separability,
    shuffled,
    storage,
    train_curve,
    tsne,
    whole,
    write_weights,
)
from peft_mask.analysis.__main__ import main
from peft_mask.format.packing import entropy_bits
from tests.tiny_models import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[2]
RANDOM = {"binarizer": "threshold", "candidates": None, "init_weights": False}


def masked(seed=0, task_type="SEQ_CLS", **fields):
    """A tiny model under random masks, with scores."""
    return get_peft_model(tiny_model("bert"), MaskConfig(task_type=task_type, seed=seed, **(RANDOM | fields))).eval()


def batches(model, count=2):
    return [tiny_inputs(model, batch_size=4, labels=True, seed=seed) for seed in range(count)]


def one(*kept):
    """Masks of one module with one row."""
    return Masks({"0": torch.tensor([kept], dtype=torch.bool)})


# ---- adapters ----


def test_the_masks_of_a_live_model_are_those_it_saves(tmp_path):
    model = masked()
    model.save_pretrained(tmp_path)
    taken = masks_of(model)
    assert taken == Masks.load(tmp_path)
    assert 0.4 < taken.sparsity < 0.6


def test_masks_taken_from_a_model_do_not_change_with_it():
    model = masked()
    taken = masks_of(model)
    for name, parameter in model.named_parameters():
        if "peft_mask_scores" in name:
            parameter.data.neg_()
    assert masks_of(model) == ~taken


def test_a_model_without_such_masks_is_refused():
    with pytest.raises(ValueError, match="no masks of an adapter named 'other'"):
        masks_of(masked(), "other")
    with pytest.raises(ValueError, match="no masks of an adapter named 'default'"):
        masks_of(tiny_model("bert"))


@pytest.mark.parametrize("wrap", ["mask", "lora", "none"])
def test_effective_weights_are_the_plain_model_that_computes_the_same(wrap):
    plain = tiny_model("bert")
    if wrap == "lora":
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(plain), config).eval()
    else:
        model = masked() if wrap == "mask" else plain
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = effective_weights(model)
    inputs = tiny_inputs(model)
    other = tiny_model("bert", seed=1)  # nothing of it may remain
    write_weights(other, weights)
    assert torch.allclose(other(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if wrap == "mask":
        name, mask = next(iter(masks_of(model).items()))
        assert torch.equal(weights[f"{name}.weight"], plain.get_submodule(name).weight * mask)


def test_effective_weights_are_copies():
    layer = nn.Linear(2, 2)
    weights = effective_weights(layer)
    weights["weight"].zero_()
    assert layer.weight.abs().sum() > 0


def test_weights_of_another_model_are_not_written():
    layer, own = nn.Linear(2, 1), nn.Linear(2, 1).state_dict()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"(?s)missing: \['bias'\].*not in the model: \['scale'\]"):
        write_weights(layer, {"weight": own["weight"], "scale": own["bias"]})
    with pytest.raises(ValueError, match=r"cannot write 'weight': expected shape \(1, 2\), got \(2, 2\)"):
        write_weights(layer, {"bias": torch.zeros(1), "weight": torch.zeros(2, 2)})
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_masks_written_into_a_plain_model_compute_what_the_adapter_does():
    model, plain = masked(), tiny_model("bert")
    plain.classifier.load_state_dict(model.get_base_model().classifier.original_module.state_dict())
    apply_masks(plain, masks_of(model))
    inputs = tiny_inputs(plain)
    assert torch.allclose(plain(**inputs).logits, model(**inputs).logits, atol=1e-6)


def test_masks_of_weights_that_are_not_there_are_not_written():
    layer = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    with pytest.raises(ValueError, match="'1' masks a parameter of ReLU"):
        apply_masks(layer, {"0": torch.zeros(1, 2, dtype=torch.bool), "1": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="has no module 'bert'"):
        apply_masks(layer, {"bert": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"for a weight of shape \(2, 1\), the base model's is \(1, 2\)"):
        apply_masks(layer, {"0": torch.ones(2, 1, dtype=torch.bool)})
    assert layer[0].weight.abs().min() > 0


# ---- storage ----


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert"))


def test_the_papers_figures_follow_from_the_shape_of_bert_base(bert_base):
    shapes = masked_shapes(bert_base, paper_config())
    assert sum(shape.numel() for shape in shapes.values()) == 71_370_240
    assert len(shapes) == 10 * 6 + 2
    counted = storage(bert_base, paper_config())
    assert (round(counted.mask / 1e6, 2), counted.head) == (8.92, 0)
    assert counted.base == 4 * 109_482_240
    figures = {row["tasks"]: row for row in counted.table([1, 4, 11])}
    mb = {tasks: (round(row["masking"] / 1e6, 1), round(row["finetuning"] / 1e6, 1)) for tasks, row in figures.items()}
    assert mb == {1: (446.9, 437.9), 4: (473.6, 1751.7), 11: (536.1, 4817.2)}
    assert round(figures[11]["ratio"], 1) == 9.0


@pytest.mark.parametrize(
    ("model_type", "blocks", "mask_mb", "base_mb"),
    [("bert", range(12), 10.69, 437.93), ("distilbert", range(2, 6), 3.61, 265.45)],
)
def test_other_choices_of_blocks_and_models(model_type, blocks, mask_mb, base_mb):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type))
    config = paper_config(blocks)
    if model_type == "distilbert":
        indices = "|".join(map(str, blocks))
        names = rf".*\.layer\.({indices})\.(attention\.(q|k|v|out)_lin|ffn\.lin[12])|pre_classifier|classifier"
        config = MaskConfig.paper(target_modules=names)
    counted = storage(model, config)
    assert (round(counted.mask / 1e6, 2), round(counted.base / 1e6, 2)) == (mask_mb, base_mb)


def test_a_trained_head_counts_for_both(bert_base):
    config = MaskConfig(task_type="SEQ_CLS")
    counted = storage(bert_base, config, sparsity=0.005)
    head = 4 * (768 * 2 + 2)
    assert counted.head == head
    assert counted.finetuning(3) == 3 * (counted.base + head)
    assert counted.masking(3) == counted.base + 3 * (counted.mask + head)
    assert config.target_modules is None, "the configuration is not changed"


def test_coded_masks_take_little_more_than_their_entropy(bert_base):
    shapes = masked_shapes(bert_base, MaskConfig(task_type="SEQ_CLS")).values()
    coded = storage(bert_base, MaskConfig(task_type="SEQ_CLS"), sparsity=0.005).mask
    entropy = sum(entropy_bits(round(0.005 * s.numel()), s.numel()) for s in shapes) / 8
    assert entropy < coded < 1.05 * entropy


def test_the_estimate_is_what_a_file_takes(tmp_path):
    model = tiny_model("bert")
    config = MaskConfig(task_type="SEQ_CLS")
    made = random_masks(masked_shapes(model, config), 0.05)
    made.save(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert abs(size - storage(model, config, sparsity=0.05).mask) < 0.05 * size


# ---- similarity ----


def test_dissimilarity_is_the_papers_formula():
    start = one(1, 1, 0, 0, 1, 1)
    first, second = one(0, 1, 1, 0, 1, 1), one(0, 1, 0, 1, 0, 1)
    # apart in 3 places (2, 3, 4); moved 2 and 3 from the start
    assert dissimilarity(first, second, start) == {"0": 3 / 5}
    other = one(0, 1, 0, 0, 1, 1)  # from here the second moved 2
    assert dissimilarity(first, second, start, other) == {"0": 3 / 4}


def test_dissimilarity_of_the_same_of_disjoint_and_of_unmoved_masks():
    all_kept = one(1, 1, 1, 1)
    assert dissimilarity(one(0, 0, 1, 1), one(0, 0, 1, 1)) == {"0": 0.0}
    assert dissimilarity(one(0, 0, 1, 1), one(1, 1, 1, 0)) == {"0": 1.0}
    assert math.isnan(dissimilarity(all_kept, all_kept)["0"])
    assert dissimilarity(one(0, 1, 1, 1), one(1, 0, 1, 1), all_kept) == {"0": 1.0}


@given(seed=st.integers(0, 1000))
def test_dissimilarity_from_one_start_is_symmetric_and_at_most_one(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, start = (
        Masks({f"layer.{i}.x": torch.rand(4, 5, generator=generator) < 0.7 for i in range(2)}) for _ in range(3)
    )
    found = dissimilarity(a, b, start)
    assert found == dissimilarity(b, a, start)
    assert all(0 <= value <= 1 for value in found.values())


def test_chance_is_what_the_documentation_says():
    shapes = {"0": (200, 500)}
    among = {"0": torch.arange(10_000)}
    first, second = (shuffled(random_masks(shapes, 0.005), seed, among) for seed in (1, 2))
    expected = 1 - 2 * 500 * 500 / (10_000 * (500 + 500))
    assert dissimilarity(first, second)["0"] == pytest.approx(expected, abs=0.02)


def test_groups_pool_their_matrices():
    names = ["e.layer.0.a", "e.layer.0.b", "e.layer.11.a", "pooler"]
    first = Masks({name: torch.tensor([[False, True, True]]) for name in names})
    second = first.map(lambda name, mask: torch.tensor([[False, False, True]]) if name.endswith("0.b") else mask)
    assert dissimilarity(first, second, by=block) == {"00": 1 / 5, "11": 0.0, "pooler": 0.0}
    assert dissimilarity(first, second, by=whole) == {"all": 1 / 9}
    assert iou(first, second, by=block) == {"00": 2 / 3, "11": 1.0, "pooler": 1.0}


def test_flip_ratio_is_that_of_the_statistics_in_training():
    model = masked()
    start, statistics = masks_of(model), MaskStatistics(model)
    for name, parameter in model.named_parameters():
        if "peft_mask_scores" in name:
            parameter.data.view(-1)[::3].neg_()
    found = flip_ratio(masks_of(model), start, whole)["all"]
    assert found == statistics(model)["flip_ratio"] > 0.3
    assert flip_ratio(start, None, whole)["all"] == start.sparsity


def test_iou_counts_zeros_and_of_the_inverse_what_is_kept():
    first, second = one(0, 0, 1, 1, 1), one(0, 1, 0, 1, 1)
    assert iou(first, second) == {"0": 1 / 3}
    assert iou(~first, ~second) == {"0": 2 / 4}
    assert math.isnan(iou(one(1, 1), one(1, 1))["0"])


def test_movement_compares_with_the_start_and_with_the_one_before():
    rows = movement([(0, one(1, 1, 1, 1)), (5, one(0, 1, 1, 1)), (9, one(0, 1, 0, 0))])
    assert [row["step"] for row in rows] == [0, 5, 9]
    assert [row["sparsity"] for row in rows] == [0, 1 / 4, 3 / 4]
    assert [row["flip_ratio"] for row in rows] == [0, 1 / 4, 3 / 4]
    assert [row["flipped_since"] for row in rows] == [0, 1 / 4, 2 / 4]
    assert [row["iou_since"] for row in rows][1:] == [0.0, 1 / 3]
    with pytest.raises(ValueError, match="no snapshot"):
        movement([])


def test_masks_of_different_modules_are_not_compared():
    with pytest.raises(ValueError, match="different modules"):
        dissimilarity(one(1, 0), Masks({"1": torch.ones(1, 2, dtype=torch.bool)}))


# ---- controls ----


def learned():
    """Masks of a tiny model with another number of zeros in each matrix."""
    model = tiny_model("bert")
    made = {}
    for i, (name, shape) in enumerate(masked_shapes(model, MaskConfig(task_type="SEQ_CLS")).items()):
        made[name] = (torch.arange(shape.numel()) > 3 * i).view(shape)
    return model, Masks(made)


def test_controls_have_as_many_zeros_in_each_matrix():
    model, masks = learned()
    for control in (shuffled(masks), magnitude_masks(masks, model), magnitude_masks(masks, model, largest=True)):
        assert control.zeros == masks.zeros
        assert control != masks


def test_a_shuffle_is_random_seeded_and_the_same_for_a_module_whatever_the_others():
    _, masks = learned()
    assert shuffled(masks, 1) == shuffled(masks, 1)
    assert shuffled(masks, 1) != shuffled(masks, 2)
    name = list(masks)[3]
    alone = Masks({name: masks[name]})
    assert torch.equal(shuffled(alone, 1)[name], shuffled(masks, 1)[name])
    twins = Masks({"a": masks[name], "b": masks[name]})
    assert not torch.equal(shuffled(twins, 1)["a"], shuffled(twins, 1)["b"])


def test_a_shuffle_among_candidates_stays_there():
    masks = Masks({"0": torch.arange(100).view(10, 10) >= 5})
    places = torch.arange(40, 60)
    off = (~shuffled(masks, 3, {"0": places})["0"]).view(-1).nonzero().squeeze(1)
    assert len(off) == 5
    assert torch.isin(off, places).all()
    with pytest.raises(ValueError, match="the mask of '0' has 5 zeros, and only 4 places"):
        shuffled(masks, 0, {"0": places[:4]})


def test_random_masks_have_the_sparsity_everywhere():
    masks = random_masks({"a": (20, 10), "b": (3, 1), "c": (50,)}, 0.1, seed=5)
    assert masks.zeros == {"a": 20, "b": 1, "c": 5}
    assert random_masks({"a": (20, 10)}, 0.1, seed=5)["a"].equal(masks["a"])
    with pytest.raises(ValueError, match="sparsity must be greater than 0"):
        random_masks({"a": (2, 2)}, 0.0)


def test_magnitude_masks_switch_off_the_smallest_or_the_largest():
    model, masks = learned()
    name = list(masks)[-1]
    magnitude = model.get_submodule(name).weight.abs()
    small, large = magnitude_masks(masks, model)[name], magnitude_masks(masks, model, largest=True)[name]
    assert magnitude[~small].max() <= magnitude[small].min()
    assert magnitude[~large].min() >= magnitude[large].max()
    assert 0 < (~small).sum() < small.numel()


PARTS = ["embeddings", "attention", "intermediate", "output", "pooler", "classifier"]


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "electra"])
def test_parts_are_drawn_anew_and_nothing_else(family):
    parts = [part for part in PARTS if part != "pooler" or family == "bert"]
    covered: set[str] = set()
    for part in parts:
        model, before = tiny_model(family), tiny_model(family).state_dict()
        changed = set(reinitialize(model, [part], seed=1))
        assert changed
        assert covered.isdisjoint(changed)
        covered |= changed
        for name, tensor in model.state_dict().items():
            inside = name.rpartition(".")[0] in changed
            if not inside:
                assert torch.equal(tensor, before[name]), name
            elif name.endswith("weight") and tensor.dim() == 2:
                assert not torch.equal(tensor, before[name]), name
    everything = {name.rpartition(".")[0] for name, _ in tiny_model(family).named_parameters()}
    assert {name for name in everything - covered if "relative_attention_bias" not in name} == set()


def test_new_values_have_the_models_own_spread():
    model = tiny_model("bert")
    nn.init.constant_(model.bert.embeddings.LayerNorm.weight, 3.0)
    nn.init.constant_(model.bert.embeddings.LayerNorm.bias, 3.0)
    reinitialize(model, ["embeddings"])
    words = model.bert.embeddings.word_embeddings
    assert words.weight[words.padding_idx].abs().max() == 0
    assert words.weight.detach().std() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert model.bert.embeddings.LayerNorm.weight.eq(1).all()
    assert model.bert.embeddings.LayerNorm.bias.eq(0).all()
    with torch.no_grad():
        again = tiny_model("bert")
        reinitialize(again, ["pooler", "embeddings"])
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, words.weight)


def test_parts_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"parts must be of .*got \['head'\]"):
        reinitialize(tiny_model("bert"), ["head"])
    with pytest.raises(ValueError, match="has no part 'pooler'"):
        reinitialize(tiny_model("roberta"), ["pooler"])
    odd = nn.ModuleDict({"classifier": nn.PReLU()})
    with pytest.raises(ValueError, match="cannot draw 'classifier' anew: PReLU"):
        reinitialize(odd, ["classifier"])


# ---- evaluation ----


class Says(nn.Module):
    """A classifier that says what it is told."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits[input_ids])


def rows_of(*labels):
    return [{"input_ids": torch.arange(len(labels)), "labels": torch.tensor(labels)}]


def test_accuracy_counts_what_is_right_among_what_counts():
    model = Says([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert accuracy(model, rows_of(0, 1, 0, -100)) == 2 / 3
    assert labels_of(rows_of(0, 1)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no batches"):
        logits_of(model, [])
    with pytest.raises(ValueError, match="expected logits of shape"):
        logits_of(Says([[[1.0, 0.0]]]), rows_of(0))


def test_of_a_tagger_the_tokens_with_a_label_are_the_examples():
    logits = torch.arange(12.0).view(2, 3, 2)
    labels = torch.tensor([[-100, 1, -100], [0, 1, -100]])
    tagged = [{"input_ids": torch.arange(2), "labels": labels}]
    assert logits_of(Says(logits.tolist()), tagged).tolist() == [[2.0, 3.0], [6.0, 7.0], [8.0, 9.0]]
    assert labels_of(tagged).tolist() == [1, 0, 1]
    assert accuracy(Says(logits.tolist()), tagged) == 2 / 3
    language_model = tiny_model("bert", "lm")
    with pytest.raises(ValueError, match=r"or of a tagger \(examples, tokens, classes\)"):
        logits_of(language_model, [tiny_inputs(language_model, labels=True)])


def test_generalization_is_measured_against_the_most_common_label():
    models = {"a": Says([[1.0, 0.0]] * 4), "b": lambda: Says([[0.0, 1.0]] * 4)}
    rows = generalization(models, {"a": rows_of(0, 0, 0, 1), "b": rows_of(1, 1)})
    assert [(row["model"], row["dataset"], row["accuracy"], row["majority"]) for row in rows] == [
        ("a", "a", 0.75, 0.75),
        ("a", "b", 0.0, 1.0),
        ("b", "a", 0.25, 0.75),
        ("b", "b", 1.0, 1.0),
    ]
    assert rows[2]["gain"] == -0.5
    with pytest.raises(ValueError, match="'c' has labels up to 5, the model of 'a' predicts 2 classes"):
        generalization({"a": models["a"]}, {"c": rows_of(5)})


# ---- representations ----


def test_states_are_those_of_the_layer_with_and_without_a_wrapper():
    model = masked()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        states = model.get_base_model().bert(**inputs, output_hidden_states=True).hidden_states
    first = pooled_states(model, "bert.encoder.layer.0", [inputs])
    assert torch.allclose(first, states[1][:, 0], atol=1e-6)
    mean = pooled_states(model.get_base_model(), "bert.encoder.layer.1", [inputs], "mean")
    kept = inputs["attention_mask"].bool()
    expected = torch.stack([row[use].mean(0) for row, use in zip(states[2], kept, strict=True)])
    assert not kept.all(), "padding must be left out of the mean"
    assert torch.allclose(mean, expected, atol=1e-6)


def test_layers_without_states_are_refused():
    model = tiny_model("bert")
    inputs = [tiny_inputs(model)]
    with pytest.raises(ValueError, match="the model has no module 'encoder'"):
        pooled_states(model, "encoder", inputs)
    with pytest.raises(ValueError, match="expected 'classifier' to put out"):
        pooled_states(model, "classifier", inputs)
    with pytest.raises(ValueError, match="pooling must be"):
        pooled_states(model, "bert", inputs, "max")
    assert not model.classifier._forward_hooks


def test_principal_components_are_the_directions_of_most_variance():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6)).Q
    vectors = torch.randn(500, 6) * torch.tensor([5.0, 2.0, 0.1, 0.1, 0.1, 0.1]) @ directions.T + 7
    points, shares = principal_components(vectors)
    assert points.var(0).tolist() == pytest.approx([25, 4], rel=0.2)
    assert shares.sum() > 0.99
    assert points.mean(0).abs().max() < 1e-4
    turned, _ = principal_components(vectors.flip(0))
    assert torch.allclose(turned.flip(0), points, atol=1e-4)
    with pytest.raises(ValueError, match="count must be from 1 to 6"):
        principal_components(vectors, 7)


def test_separability_is_high_where_a_line_separates_and_chance_where_none_does():
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    apart = torch.randn(400, 5)
    apart[:, 2] += 6 * labels
    assert separability(apart[:200], labels[:200], apart[200:], labels[200:]) > 0.98
    nothing = torch.randn(400, 5)
    assert 0.35 < separability(nothing[:200], labels[:200], nothing[200:], labels[200:]) < 0.65
    crossed = torch.randn(400, 2).sign()  # exclusive or: two classes that no line separates
    parity = (crossed.prod(1) > 0).long()
    assert separability(crossed[:200], parity[:200], crossed[200:], parity[200:]) < 0.8


def test_separability_does_not_depend_on_scale_or_place():
    torch.manual_seed(0)
    labels = torch.arange(200) % 3
    vectors = torch.randn(200, 4) + labels[:, None]
    split = slice(0, 100), slice(100, 200)
    plain = separability(vectors[split[0]], labels[split[0]], vectors[split[1]], labels[split[1]])
    moved = 1000 * vectors + 50
    assert separability(moved[split[0]], labels[split[0]], moved[split[1]], labels[split[1]]) == plain
    assert plain > 1 / 3


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    vectors = torch.cat([torch.randn(20, 8), torch.randn(20, 8) + 20])
    points = tsne(vectors, perplexity=5)
    assert points.shape == (40, 2)
    within = (points[:20] - points[:20].mean(0)).norm(dim=1).mean()
    assert within < (points[:20].mean(0) - points[20:].mean(0)).norm()
    assert torch.equal(points, tsne(vectors, perplexity=5))


# ---- connectivity ----


def test_a_curve_without_bends_is_the_segment_and_its_ends_are_exact():
    first, second = effective_weights(tiny_model("bert", seed=0)), effective_weights(tiny_model("bert", seed=1))
    line = Curve(first, second)
    assert all(torch.equal(tensor, first[name]) for name, tensor in line(0).items())
    assert all(torch.equal(tensor, second[name]) for name, tensor in line(1).items())
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.allclose(line(0.3)[name], 0.7 * first[name] + 0.3 * second[name])
    assert line.parameters() == []
    kept = [name for name, tensor in first.items() if not tensor.is_floating_point()]
    assert kept, "positions are integers"
    assert all(torch.equal(line(0.5)[name], first[name]) for name in kept)


@given(t=st.floats(0, 1), bends=st.integers(1, 4))
def test_untrained_bends_leave_the_segment_as_it_is(t, bends):
    start, end = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([5.0, 2.0])}
    assert torch.allclose(Curve(start, end, bends)(t)["w"], Curve(start, end)(t)["w"], atol=1e-5)


def test_a_trained_curve_goes_around_and_its_ends_stay():
    # the loss is low on the circle of radius 1; the segment between two points of it passes through the middle
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.zeros(2))

        def forward(self):
            return SimpleNamespace(loss=(self.at.square().sum() - 1).square())

    start, end = {"at": torch.tensor([-1.0, 0.01])}, {"at": torch.tensor([1.0, 0.01])}
    model, curve = Point(), Curve(start, end, bends=3)
    before = [row["score"] for row in scan(model, Curve(start, end), lambda m: -float(m().loss.detach()))]
    losses = train_curve(model, curve, [{}] * 400, lr=0.05)
    after = [row["score"] for row in scan(model, curve, lambda m: -float(m().loss.detach()))]
    assert min(before) < -0.9
    assert min(after) > -0.1
    assert (before[0], before[-1]) == (after[0], after[-1])
    assert sum(losses[-50:]) < sum(losses[:50])
    assert model.at.abs().sum() == 0, "the model itself is not changed"


def test_a_curve_is_trained_through_a_real_model():
    model = tiny_model("bert")
    first, second = effective_weights(model), effective_weights(tiny_model("bert", seed=1))
    curve = Curve(first, second, bends=2)
    before = [tensor.detach().clone() for tensor in curve.parameters()]
    train_curve(model, curve, batches(model), lr=1e-3)
    assert any(not torch.equal(now, then) for now, then in zip(curve.parameters(), before, strict=True))
    assert all(torch.equal(tensor, first[name]) for name, tensor in curve(0).items())
    assert all(torch.equal(tensor, effective_weights(model)[name]) for name, tensor in first.items())


def test_a_scan_scores_the_weights_along_the_line():
    layer = nn.Linear(1, 1)
    start = {"weight": torch.tensor([[0.0]]), "bias": torch.tensor([1.0])}
    end = {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])}
    before = layer.weight.item()
    rows = scan(layer, Curve(start, end), lambda moved: moved.weight.item() + moved.bias.item(), points=5)
    assert rows == [{"t": t, "score": 1 + 2 * t} for t in (0, 0.25, 0.5, 0.75, 1)]
    assert layer.weight.item() == before
    assert barrier(rows) == 0
    assert barrier([{"t": 0.0, "score": 1.0}, {"t": 0.5, "score": 0.2}, {"t": 1.0, "score": 0.0}]) == pytest.approx(0.3)


def test_ends_that_do_not_fit_and_curves_that_cannot_be_trained_are_refused():
    w = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"only at the start \['w'\], only at the end \['v'\]"):
        Curve(w, {"v": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"cannot connect 'w': its shapes are \(2,\) and \(3,\)"):
        Curve(w, {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="bends must be at least 0"):
        Curve(w, w, bends=-1)
    with pytest.raises(ValueError, match="no bends to train"):
        train_curve(nn.Linear(1, 1), Curve(w, w), [], lr=0.1)
    with pytest.raises(ValueError, match="points must be at least 2"):
        scan(nn.Linear(1, 1), Curve(w, w), lambda model: 0.0, points=1)


# ---- ensembles ----


def several(tmp_path, count=3, head="seq_cls"):
    """One base model with masks and heads of several seeds loaded into it, and each loaded alone."""
    alone = []
    for seed in range(count):
        config = MaskConfig(task_type=head.upper(), seed=seed, **RANDOM)
        model = get_peft_model(tiny_model("bert", head), config)
        nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight, std=seed + 1.0)
        model.save_pretrained(tmp_path / str(seed))
        alone.append(PeftModel.from_pretrained(tiny_model("bert", head), tmp_path / str(seed)).eval())
    together = PeftModel.from_pretrained(tiny_model("bert", head), tmp_path / "0", adapter_name="0")
    for seed in range(1, count):
        together.load_adapter(tmp_path / str(seed), str(seed))
    return together, alone


@pytest.mark.parametrize("head", ["seq_cls", "token_cls"])
def test_adapters_of_one_base_say_what_each_says_alone(tmp_path, head):
    together, alone = several(tmp_path, head=head)
    rows = batches(together)
    before = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    logits = adapter_logits(together, ["0", "1", "2"], rows)
    expected = torch.stack([logits_of(model, rows) for model in alone])
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not torch.equal(logits[0], logits[1])
    assert len(ensemble_table(logits, labels_of(rows))) == 3 + 1 + 3
    assert together.active_adapters == ["0"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in together.state_dict().items())


def test_an_ensemble_leaves_what_is_trained_as_it_was():
    model = masked()
    model.add_adapter("b", MaskConfig(task_type="SEQ_CLS", seed=1, **RANDOM))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapter_logits(model, ["b", "default"], batches(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_an_ensemble_of_what_is_not_there_or_merged_is_refused():
    model = masked()
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        adapter_logits(model, ["default", "x"], batches(model))
    assert not any(getattr(module, "merged", False) for module in model.modules())
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        adapter_logits(model, ["default"], batches(model))
    lora = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="expected a model with masks, got one with LoraModel"):
        adapter_logits(lora, ["default"], [])


def test_the_three_ways_to_decide_differ():
    logits = torch.tensor(
        [
            [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [9.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 4.0, 0.0]],
            [[9.0, 0.0, 0.0], [0.0, 0.0, 4.0], [0.0, 4.0, 0.0]],
        ]
    )
    assert ensemble(logits, "labels").tolist() == [1, 0, 1]  # of the tie the first
    assert ensemble(logits, "logits").tolist() == [0, 2, 0]
    assert ensemble(logits, "probabilities").tolist() == logits.softmax(-1).sum(0).argmax(-1).tolist() == [0, 2, 1]
    labels = torch.tensor([1, 2, 1])
    table = {row["who"]: row["accuracy"] for row in ensemble_table(logits, labels)}
    assert table == {
        "member 0": pytest.approx(1 / 3),
        "member 1": pytest.approx(2 / 3),
        "member 2": pytest.approx(2 / 3),
        "mean of members": pytest.approx(5 / 9),
        "labels": pytest.approx(2 / 3),
        "logits": pytest.approx(1 / 3),
        "probabilities": pytest.approx(2 / 3),
    }


def test_ways_to_decide_that_are_none_are_refused():
    with pytest.raises(ValueError, match="by must be one of"):
        ensemble(torch.zeros(1, 1, 2), "median")
    with pytest.raises(ValueError, match="expected logits of shape"):
        ensemble(torch.zeros(1, 2), "labels")


def test_tables_leave_open_what_is_not_known():
    rows = [{"a": 1234567, "b": 0.12345}, {"a": None, "c": 4817.16}]
    assert markdown(rows).splitlines()[2:] == ["| 1,234,567 | 0.1235 |  |", "|  |  | 4,817.2 |"]


# ---- the command ----


def test_the_command_counts_storage(capsys):
    main(["storage", "--blocks", "2-11", "--tasks", "4", "11"])
    printed = capsys.readouterr().out
    assert "| 4 | 8.921 | 1,751.7 | 473.6 |" in printed
    assert "| 11 | 8.921 | 4,817.2 | 536.1 |" in printed
    assert "MaskConfig(), 0.50% off, coded" in printed


def test_the_command_compares_adapters(tmp_path, capsys):
    masked(0).save_pretrained(tmp_path / "a")
    masked(1).save_pretrained(tmp_path / "b")
    main(["dissimilarity", str(tmp_path / "a"), str(tmp_path / "b"), "--by", "all"])
    first, second = Masks.load(tmp_path / "a"), Masks.load(tmp_path / "b")
    assert f"| all | {dissimilarity(first, second, by=whole)['all']:.4g} |" in capsys.readouterr().out
    main(["dissimilarity", str(tmp_path / "a"), str(tmp_path / "b"), "--start", str(tmp_path / "b"), "--by", "all"])
    assert "| all | 1 |" in capsys.readouterr().out  # the second has not moved: |a - b| / |a - b|
    with pytest.raises(SystemExit, match="error: no masks at"):
        main(["dissimilarity", str(tmp_path / "a"), str(tmp_path / "c")])
    with pytest.raises(SystemExit, match="at most two starts"):
        main(["dissimilarity", *[str(tmp_path / "a")] * 2, "--start", *[str(tmp_path / "a")] * 3])


def test_the_command_follows_checkpoints_in_order_of_steps(tmp_path, capsys):
    for step in (100, 20):
        model = masked(step)
        keep_scores(model)  # as Trainer's checkpoints do, with MaskCallback
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    main(["movement", *map(str, sorted(tmp_path.iterdir()))])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 20", "| 100"]
    with pytest.raises(SystemExit, match="does not end in a number of steps"):
        main(["movement", str(tmp_path / "last")])


@pytest.mark.parametrize("kind", ["shuffled", "magnitude", "largest"])
def test_the_command_writes_controls_that_load_with_the_same_head(kind, tmp_path, capsys):
    base = tiny_model("bert")
    base.save_pretrained(tmp_path / "base")
    model = masked(init_sparsity=0.1)
    model.save_pretrained(tmp_path / "learned")
    main(["control", kind, str(tmp_path / "learned"), str(tmp_path / "made"), "--base", str(tmp_path / "base")])
    assert "made: Masks(13 masks" in capsys.readouterr().out
    original, made = Masks.load(tmp_path / "learned"), Masks.load(tmp_path / "made")
    expected = shuffled(original) if kind == "shuffled" else magnitude_masks(original, base, kind == "largest")
    assert made == expected
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "made")
    assert masks_of(loaded) == expected
    heads = [one.get_base_model().classifier.modules_to_save["default"].weight for one in (loaded, model)]
    assert torch.equal(*heads)


def test_the_command_asks_for_a_base_where_weights_count(tmp_path):
    masked().save_pretrained(tmp_path / "a")
    with pytest.raises(SystemExit, match="'magnitude' needs --base"):
        main(["control", "magnitude", str(tmp_path / "a"), str(tmp_path / "b")])


# ---- weight ----


@pytest.mark.slow
def test_numbers_and_tables_need_neither_matplotlib_nor_scikit_learn():
    code = """
import sys
from transformers import Trainer  # of some releases imports scikit-learn where it is installed
others = set(sys.modules)
import peft_mask.analysis, peft_mask.analysis.__main__
assert not {"matplotlib", "sklearn"} & (set(sys.modules) - others)
import peft_mask.analysis.plots
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
