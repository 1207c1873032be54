"""What is estimated and measured of large Llamas, on tiny ones: rows that fit, and those that do not."""

import json

import pytest
import torch

from benchmarks import cards, llama_step
from tests.versions import RUNS_ON_META

pytestmark = pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")

TINY = cards.LLAMAS["8B"] | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
}
MASKED = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
PARAMETERS = MASKED + 2 * 500 * 64 + 5 * 64
IN_BACKWARD = cards.MASKED[-1]


@pytest.fixture(scope="module")
def eight_billion():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = {}
    for base in cards.BASES:
        for variant in ("mask", IN_BACKWARD):
            found[base, variant] = cards.estimate(cards.LLAMAS["8B"], base, variant, cards.SHORTEST)
    return found


def test_the_state_of_a_mask_of_an_8b_in_four_bits_is_below_three_gigabytes(eight_billion):
    memory = eight_billion["nf4", IN_BACKWARD]
    masked = 6_979_321_856
    assert memory.scores == pytest.approx(
        (0.2 + 0.1 + 2 / 256) * masked, rel=1e-3
    )  # positions in a byte each, and blocks
    assert memory.gradients == memory.optimizer == 0
    assert memory.scores < 2.2e9
    assert memory.parameters == pytest.approx(5.7e9, rel=0.01)
    assert eight_billion["nf4", "mask"].scores == pytest.approx((0.4 + 0.1 + 2 / 256) * masked, rel=1e-3)
    assert eight_billion["bfloat16", "mask"].scores == pytest.approx(0.8 * masked, rel=1e-3)


def test_an_8b_in_bfloat16_with_the_default_does_not_fit_24_gb(eight_billion):
    assert cards.usable(80) == 75 * 2**30  # a GiB for CUDA, and a twentieth
    fits = {key: memory.total <= cards.usable(24) for key, memory in eight_billion.items()}
    assert not fits["bfloat16", "mask"]
    assert fits["bfloat16", IN_BACKWARD]
    assert all(fits[key] for key in fits if key[0] == "nf4")


def test_full_fine_tuning_and_lora_hold_what_they_train():
    full = cards.estimate(TINY, "bfloat16", "full fine-tuning", 32)
    held = 2 * PARAMETERS + 2 * 32  # with the angles of positions, and a copy of them
    assert (full.parameters, full.gradients, full.optimizer) == (held, 2 * PARAMETERS, 4 * PARAMETERS)
    lora = cards.estimate(TINY, "bfloat16", "LoRA r=8", 32)
    matrices = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (lora.scores, lora.gradients, lora.optimizer) == (4 * matrices, 4 * matrices, 8 * matrices)
    assert lora.parameters == full.parameters
    logits = 4 * 32 * 500
    assert full.transient == lora.transient == 2 * logits


@pytest.mark.parametrize(
    ("variant", "base"), [("mask", "nf4"), ("LoRA r=8", "bfloat16"), ("full fine-tuning", "bfloat16")]
)
def test_the_longest_row_fits_and_a_longer_one_does_not(variant, base):
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def needs(tokens):
        return cards.estimate(TINY, base, variant, tokens).total

    room = 20 * 2**20
    tokens = cards.longest(room, needs)
    assert 0 < tokens < cards.CONTEXT
    assert tokens % cards.SHORTEST == 0
    assert needs(tokens) <= room < needs(tokens + cards.SHORTEST)
    assert cards.longest(needs(cards.SHORTEST) - 1, needs) == 0
    assert cards.longest(10**12, needs) == cards.CONTEXT
    assert cards.written(0) == "does not fit"


def test_the_table_of_cards_has_a_row_for_each_way_to_train(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setitem(cards.LLAMAS, "1B", TINY)
    cards.main(["--models", "1B", "--results", str(tmp_path)])
    text = (tmp_path / "cards.md").read_text()
    rows = [line.strip("| ").split(" | ")[1:3] for line in text.splitlines() if line.startswith("| Llama 1B")]
    expected = [[base, variant] for base in cards.BASES for variant in cards.VARIANTS]
    assert rows == [row for row in expected if row != ["nf4", "full fine-tuning"]]
    state = json.loads((tmp_path / "cards.json").read_text())["figures"]["state"]
    assert state["nf4/mask"]["sum"] == sum(list(state["nf4/mask"].values())[:3])


@pytest.fixture
def tiny_steps(monkeypatch):
    monkeypatch.setitem(llama_step.LLAMAS, "1B", TINY)
    return ["--models", "1B", "--tokens", "96", "8", "--rounds", "2", "--device", "cpu", "--results"]


def test_steps_are_taken_on_rows_of_every_length(tmp_path, tiny_steps):
    variants = ["mask", llama_step.LORA, llama_step.FULL]
    llama_step.main([*tiny_steps, str(tmp_path), "--variants", *variants])
    figures = json.loads((tmp_path / "llama-step.json").read_text())["figures"]
    assert [*figures] == [f"1B/{tokens}/{variant}" for tokens in (8, 96) for variant in variants]
    for figure in figures.values():
        assert len(figure["seconds"]) == 2
        assert figure["event_seconds"] == []
        assert figure["peak_bytes"] > 2 * PARAMETERS
    full, lora = (figures[f"1B/96/{variant}"]["peak_bytes"] for variant in (llama_step.FULL, llama_step.LORA))
    assert full > lora + 2 * PARAMETERS
    assert "does not fit" not in (tmp_path / "llama-step.md").read_text()


def test_a_row_has_medians_tokens_a_second_and_times_lora():
    own = {"seconds": [2.0, 9.0, 4.0], "event_seconds": [1.0, 3.0, 2.5], "peak_bytes": 30e9}
    lora = {"seconds": [2.0, 2.0, 7.0], "event_seconds": [], "peak_bytes": 0}
    row = llama_step.row_of("Llama", 4096, "mask", own, lora, int(31.26e9))
    assert row == ("Llama", "4,096", "mask", "4000", "2500", "1,024", "2.00", "30.0", "31.3")
    assert llama_step.row_of("Llama", 8, "mask", own | {"event_seconds": []}, None, 0)[4:7] == ("", "2", "")
    assert llama_step.row_of("Llama", 8, "mask", None, lora, 0)[3:] == ("does not fit", "", "", "", "", "0.0")


@pytest.mark.parametrize("variant", llama_step.VARIANTS)
def test_a_step_trains_what_its_variant_says(variant):
    model, optimizer = llama_step.made(variant, TINY, "cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    llama_step.step_of(model, optimizer, 96)()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    part = {llama_step.LORA: "lora_", llama_step.FULL: ""}.get(variant, "peft_mask_scores")
    assert changed
    assert all(part in name for name in changed)
    if variant == llama_step.FULL:
        assert changed == {name for name in before if "norm" not in name}  # a step that bfloat16 rounds away


def test_what_does_not_fit_is_said_and_the_rest_is_measured(tmp_path, tiny_steps, monkeypatch):
    made, measured, order = llama_step.made, llama_step.measured, []

    def no_room(variant, *args):
        if variant == llama_step.FULL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")
        order.append(variant)
        return made(variant, *args)

    def no_room_for_long_rows(model, optimizer, tokens, *args):
        if tokens > 8 and order[-1] == "mask":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measured(model, optimizer, tokens, *args)

    monkeypatch.setattr(llama_step, "made", no_room)
    monkeypatch.setattr(llama_step, "measured", no_room_for_long_rows)
    llama_step.main([*tiny_steps, str(tmp_path), "--variants", "mask", llama_step.FULL, llama_step.LORA])
    text = (tmp_path / "llama-step.md").read_text()
    rows = [line.strip("| ").split(" | ")[1:4] for line in text.splitlines() if line.startswith("| Llama 1B")]
    assert [(tokens, variant, time == "does not fit") for tokens, variant, time in rows] == [
        ("8", "mask", False),
        ("8", llama_step.FULL, True),
        ("8", llama_step.LORA, False),
        ("96", "mask", True),
        ("96", llama_step.FULL, True),
        ("96", llama_step.LORA, False),
    ]
    figures = json.loads((tmp_path / "llama-step.json").read_text())["figures"]
    assert figures["1B/96/mask"]["fits"] is False
    assert figures["1B/96/mask"]["estimated_bytes"] > 0
