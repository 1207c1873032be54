"""The study of where zeros belong: what it scores, what it may choose, and that it goes on where it was stopped."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import super_weights
from benchmarks.decoder import adamw, take_steps
from benchmarks.zeros import __main__ as study
from benchmarks.zeros import candidates, forgetting, plan, training
from benchmarks.zeros.data import IGNORED, answered, joined, packed
from benchmarks.zeros.forgetting import answers
from benchmarks.zeros.plan import Plan
from benchmarks.zeros.report import runs_in
from peft_mask import MaskConfig, SparsitySchedule
from tests.chat_models import tiny_chat_model

TEXTS = [f"cat {number} is a pet" for number in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("banking77", "clinc150", "ag_news"):
        (root / name).mkdir()
        rows = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(TEXTS)]
        for split in ("train", "dev", "test"):
            (root / name / f"{split}.jsonl").write_text("\n".join(rows))
    (root / "clinc150" / "labels.json").write_text('["play_music", "alarm"]')
    return root


def test_of_a_row_with_an_answer_the_answer_and_its_end_are_scored(tokenizer):
    rows = answered([("a cat:", " pet"), ("an old oak:", " tree")], tokenizer)
    for number, answer in enumerate((" pet", " tree")):
        scored = rows.ids[number][rows.labels[number] != IGNORED]
        assert tokenizer.decode(scored) == answer + tokenizer.eos_token
        assert torch.equal(scored, rows.labels[number][rows.labels[number] != IGNORED])
    assert rows[torch.tensor([0])].ids.shape[1] < rows.ids.shape[1]  # a batch is as wide as its longest row
    assert rows.kept.sum(1).tolist() == [rows[torch.tensor([number])].ids.shape[1] for number in (0, 1)]


def test_of_packed_texts_every_token_is_scored(data, tokenizer):
    rows = packed(data / "ag_news" / "test.jsonl", tokenizer, blocks=2)
    assert rows.ids.shape == (2, 128)
    assert torch.equal(rows.labels, rows.ids)


def test_the_loss_is_that_of_transformers_whatever_the_batch(model, data, tokenizer):
    rows = packed(data / "ag_news" / "test.jsonl", tokenizer, blocks=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=rows.ids, labels=rows.ids).loss.item()
    for size in (1, 3, 4):
        assert training.score(model, rows, size).loss == pytest.approx(expected, rel=1e-3)


def test_a_models_own_answers_are_all_right_and_anothers_are_not(model, tokenizer):
    own = answers(model, tokenizer)
    score = training.score(model, own, size=1)
    assert score.right > 0.98  # token by token with a cache, products in bfloat16 round otherwise here and there
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    changed = training.score(model, own, size=1)
    assert changed.right < 0.9
    assert changed.exact < score.exact


def masked(model):
    return get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", target_modules=["down_proj"]))


def chosen(model, rule, rows):
    candidates.set_candidates(model, rule, [rows], lambda batch: training.logits_of(model, batch))
    return {name: set(layer.positions("default").tolist()) for name, layer in candidates.mask_layers(model).items()}


def test_activation_ranks_weights_by_the_norm_of_their_input(model, tokenizer):
    rows = answered([("a cat", " pet")], tokenizer)
    model = masked(model)
    seen = {}
    layers = candidates.mask_layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].float().norm(dim=(0, 1))})
        )
    found = chosen(model, "activation", rows)
    smallest = chosen(model, "activation, smallest", rows)
    for name, layer in layers.items():
        worth = (layer.base_layer.weight.abs() * seen[name]).flatten()
        count = candidates.scores_of(layer).numel()
        assert found[name] == set(worth.topk(count).indices.tolist())
        assert smallest[name] == set(worth.topk(count, largest=False).indices.tolist())


def test_low_rank_ranks_weights_by_the_best_approximation(model, tokenizer, monkeypatch):
    rows = answered([("a cat", " pet")], tokenizer)
    model = masked(model)
    magnitude = {
        name: set(layer.positions("default").tolist()) for name, layer in candidates.mask_layers(model).items()
    }
    assert chosen(model, "low rank", rows) == magnitude  # 32 outputs: rank 64 is all of it, the largest are the largest
    monkeypatch.setattr(candidates, "RANK", 1)
    found, others = chosen(model, "low rank", rows), chosen(model, "off the low rank", rows)
    for name, layer in candidates.mask_layers(model).items():
        left, values, right = torch.linalg.svd(layer.base_layer.weight.detach())
        first = (values[0] * torch.outer(left[:, 0], right[0])).abs().flatten()
        count = candidates.scores_of(layer).numel()
        exact = set(first.topk(count).indices.tolist())
        assert len(found[name] & exact) > 0.9 * count  # `svd_lowrank` is an approximation
        assert not found[name] & others[name]


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "STEPS", {"banking77": 2, "clinc150": 2})
    monkeypatch.setattr(forgetting, "QUESTIONS", forgetting.QUESTIONS[:2])
    monkeypatch.setattr(forgetting, "LENGTH", 4)
    arguments = ["--model", folder, "--data", str(data), "--results", str(tmp_path)]
    study.main([*arguments, "--learn", "clinc150", "--study", "rivals", "candidates"])
    rows = runs_in(tmp_path).read()
    methods = [row["method"] for row in rows.values()]
    assert {name: methods.count(name) for name in ("base", "full", "LoRA", "mask")} == {
        "base": 1,
        "full": 2,
        "LoRA": 2,
        "mask": len([*plan.candidates("clinc150")]),
    }
    assert all(0 <= row["dev_exact"] <= 1 and 0 <= row["answers_right"] <= 1 for row in rows.values())
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n| mask |") == methods.count("mask")

    seen = []
    monkeypatch.setattr(study, "figures_of", lambda plan, setting: seen.append(plan) or {"dev": 1.0})
    monkeypatch.setattr(study, "write_page_of", lambda folder: None)
    study.main([*arguments, "--learn", "clinc150", "--study", "rivals", "candidates"])
    assert seen == []
    study.main([*arguments, "--learn", "clinc150", "--study", "rivals", "--seeds", "1"])
    assert [(made.method, made.seed) for made in seen] == [("full", 1), ("LoRA", 1)]  # each at the rate that dev chose
    for made in seen:
        tries = [row for row in rows.values() if row["method"] == made.method]
        assert made.rate == min(tries, key=lambda row: row["dev"])["rate"]


def test_steps_tell_how_far_the_training_is_and_learn():
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(2, 1), []
    x = torch.randn(8, 2)
    losses = take_steps(
        model,
        adamw(model, 0.1),
        [x] * 20,
        lambda model, batch: (model(batch) - batch.sum(1, keepdim=True)).square().mean(),
        lambda model, progress: seen.append(progress),
    )
    assert seen == [number / 20 for number in range(1, 21)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2


def test_the_budget_of_a_mask_grows_as_the_callback_lets_it(folder, data, tokenizer, monkeypatch):
    shares = []
    monkeypatch.setattr(training, "spend_budget", lambda model, share: shares.append(share))
    setting = training.Setting(folder, {"banking77": study.texts(data / "banking77", tokenizer)}, *[None] * 2)
    training.train(replace(plan.mask("banking77", "all", 0.02), steps=4), setting)
    assert shares == [SparsitySchedule.gentle(0.02, 4).share(number / 4) for number in range(1, 5)]
    assert shares[0] < shares[-1] == 1.0


def test_super_weights_are_told_with_their_rank(folder, data, tmp_path):
    file = data / "ag_news" / "test.jsonl"
    given = ["--model", folder, "--texts", str(file), "--blocks", "1", "--tried", "3", "--rise=-9"]
    super_weights.main([*given, "--results", str(tmp_path)])
    figures = json.loads((tmp_path / "super-weights.json").read_text())["figures"]
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(figures) == 3
    assert [row["rise"] for row in figures] == sorted((row["rise"] for row in figures), reverse=True)
    for row in figures:
        weight = weights[f"{row['module']}.weight"]
        assert weight[row["output"], row["input"]].item() == pytest.approx(row["value"])
        assert row["rank"] == (weight.abs() > abs(row["value"]) * (1 + 1e-6)).sum()
        assert row["is_candidate"] == (row["rank"] < round(0.1 * weight.numel()))


def test_batches_of_a_seed_are_the_same_for_all_methods(data, tokenizer):
    learnt = study.texts(data / "banking77", tokenizer)
    orders = [
        training.order(Plan("banking77", method, 3, seed), learnt) for method in ("full", "mask") for seed in (0, 1)
    ]
    same, other, again, _ = ([batch.ids.tolist() for batch in order] for order in orders)
    assert same == again != other


def test_rows_of_tokens_are_joined_and_padded_on_the_right():
    rows = joined([([1, 2], [3]), ([4], [5, 6, 7])])
    assert rows.ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert rows.labels.tolist() == [[IGNORED, IGNORED, 3, IGNORED], [IGNORED, 5, 6, 7]]
    assert rows.kept.tolist() == [[True, True, True, False], [True, True, True, True]]
