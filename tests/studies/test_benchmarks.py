"""The measuring tools measure: order of runs, ratios, peaks, and the variants they compare."""

import json
import sys
import warnings
from collections import Counter
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

from benchmarks import codec, correction, fleet, large, llama, memory, mixed, residency, rules, server, step, switch
from benchmarks.accuracy.runs import runs_in
from benchmarks.harness import Times, in_turn, peak_bytes, report, table, together
from benchmarks.loaded import Counts, Loaded
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model
from tests.versions import RUNS_ON_META

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_variants_run_in_turn_and_the_warm_up_is_not_counted():
    order = []
    times = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert order == list("abababab")
    counts = {name: len(measured.seconds) for name, measured in times.items()}
    assert counts == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round():
    assert Times((2.0, 30.0, 4.0)).ratio(Times((1.0, 10.0, 4.0))) == (2.0, 1.0, 3.0)
    assert Times((3.0, 1.0, 2.0)).median == 2.0


def test_the_peak_is_what_was_held_at_one_time():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(1 << 18)  # 1 MiB, freed at once

    def together():
        return [torch.zeros(1 << 18) for _ in range(3)]

    assert peak_bytes(one_after_the_other) == pytest.approx(1 << 20, rel=0.01)
    assert peak_bytes(together) == pytest.approx(3 << 20, rel=0.01)


def test_a_report_is_filed_with_its_environment(tmp_path, capsys):
    report("name", "Title", table(("a", "b"), [(1, 2)]), {"x": 1}, tmp_path)
    filed = json.loads((tmp_path / "name.json").read_text())
    assert filed["figures"] == {"x": 1}
    assert filed["environment"]["versions"]["torch"] == version("torch")
    text = (tmp_path / "name.md").read_text()
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text
    assert text in capsys.readouterr().out


def test_the_environment_of_several_trainings_has_all_that_differed():
    one = {"cores": 2, "versions": {"torch": "2.6", "peft": "0.21"}, "commit": "b"}
    other = one | {"versions": {"torch": "2.13", "peft": "0.21"}, "commit": "a", "gpu": "H"}
    assert together([one]) == one
    assert together([one, other, one]) == {
        "cores": 2,
        "versions": {"torch": "2.13, 2.6", "peft": "0.21"},
        "commit": "a, b",
        "gpu": "H",
    }


def test_the_official_way_computes_what_the_mask_computes():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    official = step.OfficialLinear(linear)
    with torch.no_grad():
        official.scores[0, 0] = 0.0
    x = torch.randn(2, 5)
    weight = linear.weight.detach().clone()
    weight[0, 0] = 0
    torch.testing.assert_close(official(x), torch.nn.functional.linear(x, weight, linear.bias))
    official(x).sum().backward()
    torch.testing.assert_close(official.scores.grad, x.sum(0).expand(3, 5) * linear.weight)


@pytest.mark.parametrize("variant", step.VARIANTS)
def test_every_variant_of_the_step_trains_what_it_says(variant):
    model = step.VARIANTS[variant](step.base_model(TINY))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_step = step.make_step(variant, model, (2, 4))
    take_step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        "full fine-tuning": lambda name: True,
        **dict.fromkeys(step.MASKS, lambda name: "peft_mask_scores" in name or "modules_to_save.default" in name),
        "LoRA r=8": lambda name: "lora_" in name or "modules_to_save.default" in name,
        "official masking": lambda name: name.endswith("scores") or name.startswith("classifier"),
    }[variant]
    assert changed
    assert all(expected(name) for name in changed)


def test_steps_in_the_backward_pass_need_no_step_of_the_optimizer():
    for variant, moves in (("mask", False), ("mask, scores in bfloat16, steps in the backward pass", True)):
        model = step.VARIANTS[variant](step.base_model(TINY))
        step.make_optimizer(variant, model)
        scores = next(p for name, p in model.named_parameters() if "peft_mask_scores" in name)
        model(input_ids=torch.arange(8).view(2, 4), labels=torch.tensor([0, 1])).loss.backward()
        assert (scores.grad is None) == moves == bool(scores.any())


def test_the_switch_benchmark_switches_and_restores(tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, "MiniLM-L6", (TINY, (2, 4)))
    model = switch.served_masks(0.2, tmp_path)
    run = switch.switcher(model)
    merged = []
    for _ in range(3):
        run()
        merged.append({tuple(m.merged_adapters) for m in model.modules() if isinstance(m, MaskLayer)})
    assert merged == [{("b",)}, {("a",)}, {("b",)}]
    switch.check_exact(model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(AssertionError, match="embeddings"):
        switch.check_exact(model)


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers and bitsandbytes
def test_a_llama_goes_through_its_life(base, tmp_path, monkeypatch):
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 50}
    monkeypatch.setitem(llama.SHAPES, "1B", shape | {"num_hidden_layers": 2})
    llama.main(["--base", base, "--tokens", "8", "--steps", "2", "--results", str(tmp_path)])
    figures = json.loads((tmp_path / f"llama-1B-{base}.json").read_text())["figures"]
    assert figures["masked_weights"] == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert figures["adapter_bytes"] < figures["masked_weights"] / 8
    assert list(figures["stages"]) == ["wrap", "train", "save", "load", "compute masked", "merge", "unmerge"]
    assert all(stage["peak_bytes"] > figures["base_bytes"] for stage in figures["stages"].values())


def test_a_base_that_did_not_come_back_is_seen(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
    life = llama.Life(llama.base_model(shape | {"num_hidden_layers": 1}, False, "cpu"), 8, 1, tmp_path)
    stages = life.stages()
    for stage in ("wrap", "train", "save", "load", "compute masked", "merge"):
        stages[stage]()
    life.unmerge()
    weight = life.layers[0].base_layer.weight.data
    weight[:2] = weight[:2].flip(0)  # the same values in other places
    with pytest.raises(AssertionError):
        life.unmerge()


@pytest.mark.parametrize(
    ("options", "page"),
    [([], "step"), (["--checkpointing", "--dtype", "bfloat16"], "step-bfloat16-checkpointed")],
    ids=["plain", "checkpointed"],
)
def test_the_step_benchmark_compares_every_variant_of_the_models_named(tmp_path, monkeypatch, options, page):
    monkeypatch.setitem(step.ALL_MODELS, "MiniLM-L6", (TINY, (2, 4)))
    step.main(["--rounds", "2", "--models", "MiniLM-L6", "--results", str(tmp_path), *options])
    text = (tmp_path / f"{page}.md").read_text()
    assert ("with gradient checkpointing" in text) == bool(options)
    assert "(MiniLM-L6 2 of 4)" in text
    assert [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| MiniLM")] == [
        ["| MiniLM-L6", variant] for variant in step.VARIANTS
    ]


def test_the_switch_benchmark_compares_with_a_copy(tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, "MiniLM-L6", (TINY, (2, 4)))
    switch.main(["--rounds", "2", "--results", str(tmp_path)])
    text = (tmp_path / "switch.md").read_text()
    assert "7 maskable matrices of a MiniLM-L6-shaped BERT" in text
    assert text.count("| switch, ") == len(switch.SPARSITIES)


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
def test_the_memory_benchmark_counts_each_method(monkeypatch):
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 50,
    }
    row = (memory.AutoModelForCausalLM, shape | {"num_attention_heads": 4}, torch.bfloat16, None, (2, 8))
    monkeypatch.setitem(memory.MODELS, "tiny", row)
    masked = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    base = memory.mask_bytes("tiny", "mask")
    assert memory.mask_bytes("tiny", "mask, AdamW") - base == pytest.approx(0.8 * masked, rel=0.01)
    assert memory.mask_bytes("tiny", "mask, all weights, AdamW") - base == pytest.approx(14.8 * masked, rel=0.01)
    parameters = masked + 2 * 50 * 64 + 5 * 64
    model, inputs = memory.make("tiny")
    assert memory.full_bytes("tiny") == 8 * parameters + memory.saved_bytes(model, inputs)
    assert memory.lora_bytes("tiny") > 2 * parameters + 16 * 2 * 8 * (4 * 128 + 3 * 192)


def test_the_codec_benchmark_counts_bytes_against_the_entropy():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(256, 256, generator=generator) >= 0.05 for _ in range(2)]
    row, figures = codec.coding_row("random", masks, rounds=1)
    assert figures["entropy_bytes"] == pytest.approx(2 * 65536 * 0.286 / 8, rel=0.03)
    assert 1.0 < figures["bytes"] / figures["entropy_bytes"] < 1.1
    assert row[:2] == ("random", "-")


def test_the_codec_benchmark_codes_against_the_base():
    masks, weights = codec.random_masks(0.005, target_sparsity=0.005)
    portable, against = (codec.coding_row("", masks[:2], rounds=1, bases=bases) for bases in (None, weights[:2]))
    assert against[0][1] == "the base, float32"
    assert against[1]["bytes"] < 0.75 * portable[1]["bytes"]


def calls_of(step):
    """How many Python functions a step calls: what it takes, without a clock."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def test_what_is_done_with_an_adapter_grows_with_the_number_of_layers(tmp_path):
    calls = [
        {name: calls_of(step) for name, step in large.steps_of_an_adapter(blocks, tmp_path / f"{number}")}
        for number, blocks in enumerate((1, 1, 2, 4))  # the first imports what is imported late
    ][1:]
    assert len(calls[0]) == 6
    for name in calls[0]:
        one, two, four = (each[name] for each in calls)
        assert four - two == pytest.approx(2 * (two - one), rel=0.1), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
def test_a_large_matrix_is_packed_coded_and_loaded():
    body, figures = large.matrix((256, 520))
    assert figures["own"] == 256 * 520 * 2 + 256 * 65
    assert len(figures["peaks"]) == 12
    assert "256 x 520" in body


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is Linux's")
def test_many_adapters_are_loaded_and_switched():
    body, figures = large.adapters(1, (1, 3), large.bert(1, 32))
    assert [row["adapters"] for row in figures] == [1, 3]
    assert f"{4 * 32 * 32 + 2 * 32 * 128 + 32 * 32:,} masked weights" in body
    assert all(len(row["switch"]) == len(row["copy"]) == 1 for row in figures)


@pytest.mark.parametrize("head", ["seq_cls", "token_cls"])
@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_builds_a_model_that_learns_masks(name, head):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes", reason="8-bit optimizers are those of bitsandbytes")
    rule = rules.RULES[name]
    model = rule.build(tiny_model("bert", head), head.upper())
    optimizer = rule.optimizer(model.train(), rule.lrs[0])
    scores = [p for key, p in model.named_parameters() if "peft_mask_scores" in key]
    before = [p.detach().clone() for p in scores]
    model(**tiny_inputs(model, labels=True)).loss.backward()
    optimizer.step()
    moved = sum(bool((p != old).any()) for p, old in zip(scores, before, strict=True))
    assert moved >= len(scores) / 2, "biases of a fresh model are zeros, and their scores get no gradient"


def test_the_estimator_of_the_sigmoid_scales_the_gradient_of_the_identity():
    gradients = []
    for name in ("threshold", "threshold-sigmoid"):
        torch.manual_seed(0)
        model = rules.RULES[name].build(tiny_model("bert", "seq_cls"), "SEQ_CLS").eval()
        model(**tiny_inputs(model, labels=True)).loss.backward()
        scores = {key: p for key, p in model.named_parameters() if "peft_mask_scores" in key}
        gradients.append({key: p.grad for key, p in scores.items()})
    identity, scaled = gradients
    for key, p in scores.items():
        torch.testing.assert_close(scaled[key], identity[key] * torch.special.expit(p) * torch.special.expit(-p))
        assert scaled[key].any()


def test_the_table_of_rules_says_which_rate_was_tested(tmp_path):
    result = {"task": "trec", "method": "row", "seed": 0, "steps": 150, "dev": 0.9}
    for lr, more in ((5e-4, {"test": 0.95}), (1e-3, {})):
        runs_in(tmp_path).add(result | {"lr": lr, "sparsity": 0.005, "bits_per_weight": 0.01} | more)
    rules.main(["--results", str(tmp_path)])
    assert (tmp_path / "README.md").read_text("utf-8").splitlines()[-2:] == [
        "| trec | row | 0.0005 | 90.00 | 95.00 | 0.50 % | 0.010 |",
        "| trec | row | 0.001 | 90.00 |  | 0.50 % | 0.010 |",
    ]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_ways_to_compute_a_mixed_batch_are_compared(kind, family, tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = TINY | ({"num_key_value_heads": 1} if family == "llama" else {})
    monkeypatch.setattr(mixed, "SHAPES", {"tiny": shape})
    monkeypatch.setattr(mixed, "BATCHES", {1: (2, 40), 2: (2, 3)})
    monkeypatch.setattr(mixed, "SPARSITY", 0.05)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = ["--kinds", kind, "--dtypes", "float32", "--rounds", "2", "--results", str(tmp_path)]
    with warnings.catch_warnings():
        mixed.main(arguments)
    times = json.loads((tmp_path / "mixed.json").read_text())["figures"][f"{kind}, tiny, float32"]
    assert times.keys() == {"1", "2"}
    assert times["2"].keys() == {"base", "mask", "mask, exact", "mask, W * M formed", "LoRA r=8"}
    assert times["1"].keys() - times["2"].keys() == {"merged", "one active, not merged", "the same, W * M formed"}
    assert "| LoRA r=8 |" in (tmp_path / "mixed.md").read_text()


def test_adapters_in_memory_are_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(residency.SHAPES, "MiniLM-L6", TINY)
    monkeypatch.setattr(residency, "get_context", lambda _: ThreadPool)  # a new process would not be patched
    monkeypatch.setattr(ThreadPool, "Pool", ThreadPool, raising=False)
    arguments = ["--adapters", "6", "--masks", "2", "--rounds", "2", "--slots", "2", "--shape", "MiniLM-L6"]
    residency.main(arguments, tmp_path)
    figures = json.loads((tmp_path / "residency-float32.json").read_text())["figures"]
    assert figures["adapters"] == 6
    assert 0 < figures["slot bytes"] < figures["weights"]
    assert "miss from memory" in (tmp_path / "residency-float32.md").read_text()


def test_requests_to_a_server_are_timed_beside_loras(tmp_path, monkeypatch):
    monkeypatch.setitem(server.SHAPES, "MiniLM-L6", TINY)
    server.main(["--adapters", "3", "--requests", "24", "--rounds", "1"], tmp_path)
    figures = json.loads((tmp_path / "server-float32.json").read_text())["figures"]
    assert figures["ways"]["masks, mixed batches"]["rows a batch"] > 2
    assert figures["ways"]["masks, single rows"]["rows a batch"] == 1
    assert figures["http"]["requests a second"] > 0


def test_ways_to_serve_a_fleet_are_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(fleet.SHAPES, "MiniLM-L6", TINY)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(fleet, "SLOTS", 4)
    sizes = ["--adapters", "4", "9", "--masks", "3", "--batches", "3", "--rows", "3", "--tokens", "4"]
    with warnings.catch_warnings():
        fleet.main([*sizes, "--shape", "MiniLM-L6", "--results", str(tmp_path)])
    figures = json.loads((tmp_path / "fleet.json").read_text())["figures"]
    assert figures.keys() == {"4", "9"}
    ways = figures["9"]["ways"]
    full, third = (ways[name] for name in ways if name.startswith("AdapterCache"))
    assert (full["adapters in memory"], full["reads"]) == (9, 0)
    assert third["adapters in memory"] < 9
    assert full["misses"] > 0  # of nine in four slots
    for name, way in ways.items():
        assert len(way["seconds"]) == 3
        if name != "base alone":
            assert way["hits"] + way["misses"] == full["hits"] + full["misses"]
    assert {name.partition(",")[0] for name in ways} == {
        "base alone",
        "AdapterCache",
        "switch for each task",
        "LoRA r=8 mixed",
    }
    assert "| LoRA r=8 mixed, in the same bytes |" in (tmp_path / "fleet.md").read_text()


def test_adapters_that_peft_loads_make_way_for_others_the_least_recently_used_first():
    calls = []

    class Model:
        def load_adapter(self, folder, name, **_):
            calls.append(f"+{name}")

        def delete_adapter(self, name):
            calls.append(f"-{name}")

    loaded = Loaded(Model(), Path, 2)
    for wanted in (["a"], ["b"], ["a"], ["c", "c"], ["a"], ["b"]):
        loaded.bring(wanted)
    assert calls == ["+a", "+b", "-b", "+c", "-c", "+b"]
    assert loaded.counts == Counts(hits=2, misses=4, reads=4)


def test_the_kth_adapter_is_asked_for_in_proportion_to_one_over_k():
    names = [f"n{number}" for number in range(20)]
    batches = fleet.traffic(names, 200, 50, 2, "cpu")
    asked = Counter(name for batch in batches for name in batch.names)
    shares = [asked[name] / 10_000 for name in names]
    total = sum(1 / k for k in range(1, 21))
    assert all(abs(share - 1 / k / total) < 0.02 for k, share in enumerate(shares, 1))
    assert fleet.traffic(names, 2, 5, 2, "cpu")[1].names == fleet.traffic(names, 2, 5, 2, "cpu")[1].names


def test_the_ways_to_compute_a_mixed_batch_that_are_compared_differ_from_the_base():
    base = mixed.base_model(TINY, torch.float32, "cpu")
    call = mixed.Caller("prefill", 2, 3, "cpu")
    masks, loras = (make(TINY, base, 2, torch.float32, "cpu") for make in (mixed.masked, mixed.lora))
    far = call(base)
    for model in (masks, loras):
        found = [call(model, adapter_names=[name] * 2) for name in ("t0", "t1")]
        assert not torch.equal(*found)
        assert not any(torch.equal(one, far) for one in found)


def test_bags_are_counted_for_each_adapter_and_the_kernel_once_for_all(monkeypatch):
    monkeypatch.setattr(correction, "MATRICES", [(8, 100)])
    monkeypatch.setattr(correction, "SPARSITY", 0.5)
    (bags, _), (more_bags, _) = (correction.of_a_layer(tasks, correction.by_bags) for tasks in (1, 16))
    (once, moved), (again, more) = (correction.of_a_layer(tasks, correction.by_triton) for tasks in (1, 16))
    assert more_bags - bags == 15
    assert once == again == 2
    zeros = 400 * (4 + 2) + 9 * 4 + 8 * 4  # columns and values, pointers, places
    assert moved == zeros + 100 * 2 + 8 * 2 + 2 * 6 * 8
    assert more == 16 * moved
