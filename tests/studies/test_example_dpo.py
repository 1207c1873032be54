"""The example of preferences, run on a tiny random chat model: what it learns, writes, refers to and refuses."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples import dpo
from examples.preferences import sum_pairs
from peft_mask import Masks
from tests.studies.test_example_grpo import tokenizer
from tests.tiny_models import tiny_model

pytest.importorskip("trl", reason="trl is not installed")

# every reply must end where generation does
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}[E]{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("llama", "lm").save_pretrained(folder)
    tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


def run(model, output, *arguments, own=False):
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2", "--logging_steps", "1"]
    common += [] if own else ["--largest", "4", "--train_pairs", "8", "--test_pairs", "4"]
    return dpo.main([*common, "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", *arguments])


# ---- the script ----


@pytest.mark.parametrize("method", ["mask", "lora", "full"])
def test_every_method_learns_saves_and_reports(chat_model, tmp_path, capsys, method):
    results = run(chat_model, tmp_path, "--method", method)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results
    assert set(results["before"]) == set(results["after"]) == {"preferred", "right"}
    assert [entry["step"] for entry in results["log"]] == [1, 2]
    assert results["log"][0]["rewards/margins"] == 0  # the model is its own reference, until something has moved
    assert results["log"][1]["rewards/margins"] != 0
    file = tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert results["saved_bytes"] == file.stat().st_size
    printed = capsys.readouterr().out
    assert f"{method}: 2 steps in" in printed
    assert "4 held-out pairs, sums of two numbers up to 4:" in printed
    assert f"{tmp_path}: {results['saved_bytes']:,} bytes, {results['trained_parameters']:,} parameters" in printed


def test_the_saved_mask_is_the_trained_one_and_its_card_says_how_it_was_made(chat_model, tmp_path):
    run(chat_model, tmp_path, "--target_modules", "q_proj", "down_proj", "--target_sparsity", "0.02")
    masks = Masks.load(tmp_path)
    assert {name.rpartition(".")[2] for name in masks} == {"q_proj", "down_proj"}
    assert 0 < masks.sparsity <= 0.021
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path)
    assert list(model.peft_config) == ["default"]
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "python -m examples.dpo" in card
    assert "| preferred without it |" in card
    assert "| pairs | 8 to learn from, 4 held out, of sums of two numbers up to 4 |" in card


def test_the_reference_has_the_log_probabilities_of_the_base_to_the_bit(chat_model, tmp_path, monkeypatch):
    made, real = [], dpo.trainer_of
    monkeypatch.setattr(dpo, "trainer_of", lambda *given: made.append(real(*given)) or made[-1])
    run(chat_model, tmp_path, "--dtype", "float32", "--bf16", "false", "--target_sparsity", "0.02")
    (trainer,) = made
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        trained = dpo.log_probabilities(trainer.model, batch)
    plain = dpo.trainer_of(  # nothing but the base
        AutoModelForCausalLM.from_pretrained(chat_model),
        trainer.processing_class,
        *sum_pairs(4, 8, 4, seed=trainer.args.seed),
        dpo.ScriptArguments(chat_model, method="full"),
        trainer.args,
    )
    with torch.no_grad():
        base = torch.cat(plain.compute_ref_log_probs(plain.model, batch))
        own = dpo.log_probabilities(plain.model, batch)
    assert torch.equal(reference, base)
    torch.testing.assert_close(own, base)
    assert not torch.equal(trained, own)


def test_what_is_preferred_is_the_reply_with_the_larger_log_probability(chat_model):
    model = AutoModelForCausalLM.from_pretrained(chat_model).eval()
    ids = torch.tensor([[4, 5, 6, 7, 1], [4, 5, 9, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    batch["completion_mask"] = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = dpo.log_probabilities(model, batch)
        expected = []
        for row in ([4, 5, 6, 7], [4, 5, 9, 7, 8]):
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected.append(sum(logs[place - 1, row[place]] for place in range(2, len(row))))
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_resumed_training_ends_as_an_uninterrupted_one(chat_model, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    run(chat_model, tmp_path / "whole", *saving)
    run(chat_model, tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-1"))
    assert Masks.load(tmp_path / "again") == Masks.load(tmp_path / "whole")


# ---- pairs of one's own ----

ROWS = [{"prompt": f"{n}+{n}", "chosen": str(2 * n), "rejected": "9"} for n in range(4)]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def test_pairs_of_a_file_are_learned_and_a_tenth_or_a_test_file_is_scored(chat_model, tmp_path, capsys):
    file = written(tmp_path / "pairs.jsonl", ROWS * 5)
    results = run(chat_model, tmp_path / "a", "--train_file", file, own=True)
    assert (results["train_pairs"], results["test_pairs"], results["data"]) == (18, 2, "pairs.jsonl")
    assert set(results["after"]) == {"preferred"}
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        }
        for row in ROWS
    ]
    test = written(tmp_path / "test.jsonl", chats)
    results = run(chat_model, tmp_path / "b", "--train_file", file, "--test_file", test, own=True)
    assert (results["train_pairs"], results["test_pairs"], results["data"]) == (20, 4, "test.jsonl")
    assert "cut off" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "0"}, r"row 1: 'chosen' and 'rejected' are the same, so there is nothing to prefer; leave"),
        ({"chosen": " "}, r"row 1: message 1, of the assistant, has no text in 'content'"),
        ({"rejected": None}, r"row 1: column 'rejected' is empty"),
        ({"prompt": [{"role": "assistant", "content": "1"}]}, r"row 1: the last message of the prompt is of the assis"),
        (
            {"chosen": [{"role": "user", "content": "0"}]},
            r"row 1: column 'chosen' holds user; expected one reply of the assistant, with all before it in 'prompt'",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_by_its_number(chat_model, tmp_path, change, message):
    rows = [ROWS[0] | change, *ROWS[1:]]
    if not isinstance(change.get("prompt", ""), str):  # a column has one type
        rows = [row | {"prompt": change["prompt"]} for row in rows]
    if isinstance(change.get("chosen"), list):
        rows = [row | {"chosen": change["chosen"]} for row in rows]
    file = written(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(SystemExit, match=rf"^error: --train_file (?s:.*)pairs.jsonl: {message}"):
        run(chat_model, tmp_path / "out", "--train_file", file, own=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--test_file", "gone.jsonl"],
            r"--test_file gone\.jsonl goes with --train_file; give both, or neither for s",
        ),
        (["--train_file", "PAIRS", "--largest", "9"], r"--largest 9 is for sums, and the pairs are those of --train_f"),
        (["--train_file", "gone.jsonl"], r"gone\.jsonl"),
        (
            ["--train_file", "PAIRS", "--max_length", "3"],
            r"column 'chosen': of 4 of 4 rows nothing of an answer is le",
        ),
        (["--method", "lora", "--target_sparsity", "0.1"], r"--target_sparsity says nothing to --method lora; leave"),
        (["--target_sparsity", "2.0"], r"target_sparsity must be"),
        (["--largest", "0"], r"no more than 1 together, which is how many sums"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence(chat_model, tmp_path, arguments, message):
    file = written(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(SystemExit, match=rf"^error: (?s:.*){message}"):
        run(chat_model, tmp_path / "out", *(file if word == "PAIRS" else word for word in arguments), own=True)
    assert not (tmp_path / "out" / "results.json").exists()


# ---- sums ----


def test_of_a_pair_of_sums_one_is_right_the_other_wrong_and_none_is_learned_and_held_out():
    train, test = sum_pairs(largest=4, train=10, test=5, seed=0)
    asked = []
    for row in (*train, *test):
        (right,), (wrong,) = row["chosen"], row["rejected"]
        words = row["prompt"][-1]["content"].strip("?").split()
        numbers = int(words[-3]), int(words[-1])
        assert right["content"] == f"{numbers[0]} + {numbers[1]} = {sum(numbers)}"
        assert row["answer"] == str(sum(numbers))
        stated, _, claimed = wrong["content"].partition(" = ")
        assert stated == f"{numbers[0]} + {numbers[1]}"
        assert int(claimed) >= 0
        assert abs(int(claimed) - sum(numbers)) in (1, 2, 3, 10)
        asked.append(tuple(sorted(numbers)))
    assert len(set(asked)) == 15
    assert sum_pairs(4, 10, 5, seed=0)[0][:] == train[:]
    assert sum_pairs(4, 10, 5, seed=1)[0][:] != train[:]
