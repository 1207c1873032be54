"""The example of reinforcement learning, run on a tiny random chat model: what it learns, writes and refuses."""

import json
import string

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer

from examples import grpo
from examples.arithmetic import sums
from peft_mask import MaskConfig, MaskLayer, Masks
from tests.tiny_models import tiny_model

pytest.importorskip("trl", reason="trl is not installed")

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def tokenizer(chat_template=TEMPLATE):
    """A tokenizer that spells, so that a model of 64 tokens can count."""
    letters = string.digits + string.ascii_lowercase + " +=?.WR"
    vocabulary = {token: number for number, token in enumerate(["[S]", "[PAD]", "[E]", "[UNK]", *letters])}
    spelling = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    spelling.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelling.decoder = decoders.Fuse()
    special = {"bos_token": "[S]", "pad_token": "[PAD]", "eos_token": "[E]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=spelling, chat_template=chat_template, **special)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("llama", "lm").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def run(model, output, *arguments):
    common = ["--model_name_or_path", model, "--output_dir", str(output), "--max_steps", "2", "--logging_steps", "1"]
    common += ["--per_device_train_batch_size", "16", "--num_generations", "8", "--max_completion_length", "4"]
    common += ["--largest", "4", "--train_problems", "8", "--test_problems", "4"]
    return grpo.main([*common, "--use_cpu", "true", "--disable_tqdm", "true", *arguments])


# ---- the script ----


@pytest.mark.parametrize("method", ["mask", "lora", "full"])
def test_every_method_learns_saves_and_reports(chat_model, tmp_path, capsys, method):
    results = run(chat_model, tmp_path, "--method", method)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results
    assert 0 <= results["before"] <= 1
    assert 0 <= results["after"] <= 1
    assert [entry["step"] for entry in results["log"]] == [1, 2]
    assert {entry["reward"] for entry in results["log"]} != {0.0}
    file = tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    assert results["saved_bytes"] == file.stat().st_size
    printed = capsys.readouterr().out
    assert f"{method}: 2 steps in" in printed
    assert "(4 problems, sums of two numbers up to 4)" in printed
    assert f"{tmp_path}: {results['saved_bytes']:,} bytes, {results['trained_parameters']:,} parameters" in printed


@pytest.mark.parametrize("beta", ["0.0", "0.1"])
def test_the_saved_mask_is_the_trained_one_and_its_card_says_how_it_was_made(chat_model, tmp_path, beta):
    run(chat_model, tmp_path, "--target_modules", "q_proj", "down_proj", "--target_sparsity", "0.02", "--beta", beta)
    masks = Masks.load(tmp_path)
    assert {name.rpartition(".")[2] for name in masks} == {"q_proj", "down_proj"}
    assert 0 < masks.sparsity <= 0.021
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path)
    assert list(model.peft_config) == ["default"]
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "python -m examples.grpo" in card
    assert "| accuracy without it |" in card
    assert "| problems | 8 to learn from, 4 held out, of sums of two numbers up to 4 |" in card


@pytest.mark.parametrize("rule", ["magnitude", "random", "off-principal"])
def test_the_candidate_rule_decides_which_weights_may_go(chat_model, tmp_path, rule):
    run(chat_model, tmp_path, "--candidate_rule", rule)
    off = Masks.load(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.bfloat16)
    rule_of_model = "magnitude" if rule == "random" else rule
    model = get_peft_model(base, MaskConfig(task_type="CAUSAL_LM", candidate_rule=rule_of_model))
    layers = {name: each for name, each in model.get_base_model().named_modules() if isinstance(each, MaskLayer)}
    zeros = {name: (~off[name]).flatten().nonzero().squeeze(1) for name in layers}
    allowed = [torch.isin(zeros[name], layer.positions("default").long()).all() for name, layer in layers.items()]
    assert all(allowed) == (rule != "random")
    assert sum(map(len, zeros.values())) > 0


def test_a_resumed_training_ends_as_an_uninterrupted_one(chat_model, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    run(chat_model, tmp_path / "whole", *saving)
    run(chat_model, tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-1"))
    assert Masks.load(tmp_path / "again") == Masks.load(tmp_path / "whole")


def test_what_is_learned_is_saved_before_it_is_scored(chat_model, tmp_path, monkeypatch):
    def once(*_):
        if (tmp_path / "adapter_model.safetensors").exists():
            raise MemoryError("while it is scored")
        return 0.0

    monkeypatch.setattr(grpo, "accuracy", once)
    with pytest.raises(MemoryError, match="while it is scored"):
        run(chat_model, tmp_path)
    assert Masks.load(tmp_path).sparsity > 0


def test_what_is_pushed_has_the_card_of_the_training(chat_model, tmp_path, monkeypatch):
    """TRL writes a card of its own when it pushes."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/sums"))
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, *_, **__: self.create_model_card(model_name="sums"))
    run(chat_model, tmp_path, "--push_to_hub", "true", "--hub_strategy", "end")
    assert (tmp_path / "README.md").read_text("utf-8").count("## How it was trained") == 1


def test_figures_before_and_after_are_of_one_precision(chat_model, tmp_path, monkeypatch):
    """Of a training that changes nothing, with weights in float32 and products in bfloat16."""
    seen = []
    real = grpo.greedy_answers
    monkeypatch.setattr(grpo, "correct", lambda completions, *_, **__: [0.0] * len(completions))

    def watched(model, *given):
        with torch.no_grad():
            seen.append(model(torch.tensor([[5, 6, 7]])).logits)
        return real(model, *given)

    monkeypatch.setattr(grpo, "greedy_answers", watched)
    with pytest.warns(UserWarning, match="no score of the adapter 'default' has moved"):
        run(chat_model, tmp_path, "--bf16", "true", "--dtype", "float32")
    before, after = seen
    assert torch.equal(before, after)


def test_to_merge_the_mask_to_generate_trains_the_same_mask(chat_model, tmp_path, monkeypatch):
    merged, real = [], grpo.merge_to_generate

    def watched(model):
        generate = model.generate
        layers = [layer for layer in model.modules() if isinstance(layer, MaskLayer)]

        def seen(*given, **settings):
            merged.append({layer.merged for layer in layers})
            return generate(*given, **settings)

        model.generate = seen
        real(model)

    monkeypatch.setattr(grpo, "merge_to_generate", watched)
    log = [run(chat_model, tmp_path / "merged")["log"]]
    assert len(merged) > 2  # TRL's generations, and those that are scored
    assert all(states == {True} for states in merged)
    monkeypatch.setattr(grpo, "merge_to_generate", lambda model: None)
    log.append(run(chat_model, tmp_path / "unmerged")["log"])
    rewards = [[entry["reward"] for entry in entries] for entries in log]
    assert rewards[0] == rewards[1]
    assert Masks.load(tmp_path / "merged") == Masks.load(tmp_path / "unmerged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "./gone"], r"--model_name_or_path \./gone: "),
        (["--model_name_or_path", "NO_TEMPLATE"], r"its tokenizer has no chat template, .* expected a chat model"),
        (["--train_problems", "12"], r"--train_problems 12 and --test_problems 4: .* no more than 15 together"),
        (["--largest", "-1"], r"no more than 0 together, which is how many sums there are of two numbers up to -1"),
        (["--test_problems", "0"], r"--test_problems 0: expected at least one each"),
        (["--method", "lora", "--target_sparsity", "0.1"], r"--target_sparsity says nothing to --method lora; leave"),
        (["--method", "full", "--target_modules", "q_proj"], r"--target_modules says nothing to --method full"),
        (["--method", "full", "--candidate_rule", "random"], r"--candidate_rule says nothing to --method full"),
        (["--target_sparsity", "2.0"], r"target_sparsity must be"),
        (["--target_modules", "nowhere"], r"nowhere"),
        (["--schedule_end", "2"], r"begin and end must be fractions of the training"),
        (["--num_generations", "7"], r"must be divisible by num_generations \(7\)"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence(chat_model, tmp_path, arguments, message):
    bare = tmp_path / "bare"
    tiny_model("llama", "lm").save_pretrained(bare)
    tokenizer(chat_template=None).save_pretrained(bare)
    with pytest.raises(SystemExit, match=rf"^error: (?s:.*){message}"):
        run(chat_model, tmp_path / "out", *(str(bare) if word == "NO_TEMPLATE" else word for word in arguments))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_reward_that_is_the_same_for_all_warns(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "correct", lambda completions, *_, **columns: [1.0] * len(completions))
    with pytest.warns(UserWarning, match="a reward that is the same for all completions of a prompt"):
        run(chat_model, tmp_path)
    assert Masks.load(tmp_path).sparsity == 0


# ---- merging to generate ----


def test_merging_to_generate_changes_neither_what_is_generated_nor_a_weight():
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM", target_sparsity=0.05)).eval()
    model.base_model.set_scores(lambda name, weight: torch.randn(weight.shape))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = torch.arange(4, 16).view(2, 6)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 1, "attention_mask": torch.ones_like(prompts)}
    unmerged = model.generate(input_ids=prompts, **settings)
    merged = []
    handle = model.base_model.model.register_forward_hook(
        lambda *_: merged.append(any(layer.merged for layer in model.modules() if isinstance(layer, MaskLayer)))
    )
    grpo.merge_to_generate(model)
    assert torch.equal(model.generate(input_ids=prompts, **settings), unmerged)
    assert merged == [True] * len(merged) != []
    with pytest.raises(AttributeError, match="shape"):
        model.generate(input_ids="no tokens")
    handle.remove()
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, MaskLayer))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- the task ----


def test_of_the_sums_none_is_both_learned_and_held_out():
    train, test = sums(largest=4, train=10, test=5, seed=0)
    assert (len(train), len(test)) == (10, 5)
    pairs = []
    for row in (*train, *test):
        numbers = [int(word.strip("?")) for word in row["prompt"][-1]["content"].split() if word.strip("?").isdigit()]
        assert str(sum(numbers)) == row["answer"]
        pairs.append(tuple(sorted(numbers)))
    assert len(set(pairs)) == 15
    assert sums(4, 10, 5, seed=0)[0][:] == train[:]
    assert sums(4, 10, 5, seed=1)[0][:] != train[:]


# ---- candidates ----
