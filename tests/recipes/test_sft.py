"""Chats are learned, on a tiny random model that spells its words: what is trained, scored, saved and merged."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from peft_mask import Masks
from peft_mask.recipes import sft
from peft_mask.recipes.answers import perplexity, score
from tests.chat_models import CHATML, CHATS, PAIRS, chat, line, tiny_chat_model, write

NEW = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("chat"))


def trained(model, folder, *more, rows=CHATS):
    """The trainer after its training, and its held-out rows; the adapter is in `folder / "out"`."""
    trainer, held_out = sft.make_trainer(*sft.parse(line(model, folder, rows, *more)))
    trainer.train()
    trainer.save_model()
    return trainer, held_out


def base_of(model, tokens=None, **settings):
    base = AutoModelForCausalLM.from_pretrained(model, **settings)
    if tokens is not None:
        base.resize_token_embeddings(tokens)
    return base


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def held_out_ids(trainer):
    return torch.tensor([trainer.eval_dataset[0]["input_ids"]])


def spoken(trainer):
    """The texts that the loss is about, one for each row."""
    rows = trainer.train_dataset["labels"][:]
    return [trainer.processing_class.decode([label for label in labels if label != -100]) for labels in rows]


def test_a_mask_is_learned_scored_saved_and_merged(model, tmp_path, capsys):
    merged = tmp_path / "merged"
    figures = sft.main(line(model, tmp_path, CHATS, "--test_file", write(tmp_path / "t.jsonl", CHATS[:6])))
    assert set(figures) == {"before", "after"}
    assert figures["before"] != figures["after"]
    assert Masks.load(tmp_path / "out").sparsity == pytest.approx(0.03, abs=0.001)
    printed = capsys.readouterr().out
    assert "6 held-out answers:" in printed
    assert f"{(tmp_path / 'out/adapter_model.safetensors').stat().st_size:,} bytes" in printed
    card = ModelCard.load(tmp_path / "out/README.md")
    assert [result.metric_value for result in card.data.eval_results] == list(figures["after"].values())
    assert f"python -m examples.sft --model_name_or_path {model}" in card.text
    assert not merged.exists()


@pytest.mark.parametrize(("shorthand", "masked"), [("all-linear", 14), ("gate-projections", 2)])
def test_a_shorthand_says_which_modules_are_masked(model, tmp_path, shorthand, masked):
    trained(model, tmp_path, "--target_modules", shorthand)
    assert len(Masks.load(tmp_path / "out")) == masked


def test_what_is_printed_are_the_figures_of_what_is_saved(model, tmp_path):
    test = write(tmp_path / "test.jsonl", CHATS)
    figures = sft.main(line(model, tmp_path, CHATS, "--test_file", test, "--target_sparsity", "0.05"))
    loaded = PeftModel.from_pretrained(base_of(model), tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    losses, counts, right = [], [], 0
    for row in PAIRS:
        start = tokenizer.apply_chat_template(chat(row["prompt"]), add_generation_prompt=True, return_dict=False)
        ids = start + tokenizer(row["completion"] + "<|im_end|>")["input_ids"]
        labels = torch.tensor([[-100] * len(start) + ids[len(start) :]])
        with torch.no_grad():
            losses.append(loaded(input_ids=torch.tensor([ids]), labels=labels).loss.item())
            answer = loaded.generate(input_ids=torch.tensor([start]), max_new_tokens=6, do_sample=False)
        counts.append(len(ids) - len(start))
        right += tokenizer.decode(answer[0, len(start) :]).partition("<|im_end|>")[0].strip() == row["completion"]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert figures["after"]["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
    assert figures["after"]["exact_match"] == right / len(PAIRS)


def test_to_score_a_mask_changes_nothing(tmp_path):
    """It is merged meanwhile, and so are the rows of new tokens."""
    trainer, held_out = trained(tiny_chat_model(tmp_path / "base"), tmp_path, "--add_tokens", "<|yes|>")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    expected = perplexity(trainer)
    assert score(trainer, held_out, 4)[0]["perplexity"] == expected
    after = trainer.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_answers_that_are_learned_by_heart_match(model, tmp_path):
    test = write(tmp_path / "test.jsonl", CHATS)
    more = ["--test_file", test, "--max_steps", "80", "--target_sparsity", "0.2", "--lr_scheduler_type", "constant"]
    figures = sft.main(line(model, tmp_path, CHATS, *more))
    assert figures["before"]["exact_match"] == 0
    assert figures["after"]["exact_match"] > 0.9


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "rows",
    [
        CHATS,
        PAIRS,
        [{"prompt": chat(row["prompt"]), "completion": chat("", row["completion"])[1:]} for row in PAIRS],
    ],
    ids=["messages", "texts", "prompts of messages"],
)
def test_every_form_of_rows_is_the_same_training(model, tmp_path, rows, ending):
    test = write(tmp_path / f"test.{ending}", rows)
    trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, test, "--test_file", test)))
    expected, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, CHATS, "--test_file", test)))
    for name in ("train_dataset", "eval_dataset"):
        assert getattr(trainer, name)["input_ids"][:] == getattr(expected, name)["input_ids"][:]
        assert getattr(trainer, name)["labels"][:] == getattr(expected, name)["labels"][:]


def test_the_loss_is_that_of_every_answer_with_its_end_and_of_nothing_else(model, tmp_path):
    rows = [{"messages": chat("what is oak", "tree", "and elm", "too")}, {"messages": chat("what is cat", "pet")}]
    test = write(tmp_path / "test.jsonl", rows)
    more = ["--test_file", test, "--system", "be short"]
    trainer, held_out = sft.make_trainer(*sft.parse(line(model, tmp_path, rows, *more)))
    assert spoken(trainer) == [
        "tree<|im_end|>",
        "too<|im_end|>",
        "pet<|im_end|>",
    ]
    assert [row["prompt"][0] for row in held_out] == [{"role": "system", "content": "be short"}] * 3
    second = trainer.processing_class.decode(trainer.train_dataset[1]["input_ids"])
    turns = ["system be short", "user what is oak", "assistant tree", "user and elm", "assistant too"]
    assert second == "".join(f"<|im_start|>{turn}<|im_end|>" for turn in turns)


def test_columns_of_a_table_may_have_any_name(model, tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "\n".join(f"{row['prompt']},{row['completion']}" for row in PAIRS))
    more = ["--prompt_column", "text", "--completion_column", "label", "--test_file", str(file)]
    trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, str(file), *more)))
    assert spoken(trainer) == [f"{row['completion']}<|im_end|>" for row in PAIRS]


def test_a_tenth_is_held_out_and_not_learned(model, tmp_path):
    trainer, held_out = sft.make_trainer(*sft.parse(line(model, tmp_path)))
    learned = {trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset}
    kept = {trainer.processing_class.decode(row["input_ids"]) for row in trainer.eval_dataset}
    assert (len(learned), len(kept), len(held_out)) == (18, 2, 2)
    assert learned.isdisjoint(kept)


def test_a_loaded_adapter_computes_what_the_trained_one_does_to_the_bit(model, tmp_path):
    trainer, _ = trained(model, tmp_path)
    ids = held_out_ids(trainer)
    loaded = PeftModel.from_pretrained(base_of(model), tmp_path / "out")
    assert torch.equal(logits(loaded, ids), logits(trainer.model, ids))
    assert not torch.equal(logits(loaded, ids), logits(base_of(model), ids))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tokens", [[], ["<|yes|>", "<|no|>"]], ids=["", "new tokens"])
def test_a_merged_model_computes_what_its_adapter_does_and_needs_none(tmp_path, tied, tokens):
    folder, merged = tiny_chat_model(tmp_path / "base", tied=tied), tmp_path / "merged"
    rows = [{"prompt": row["prompt"], "completion": tokens[i % 2] if tokens else "pet"} for i, row in enumerate(PAIRS)]
    sft.main(line(folder, tmp_path, rows, "--merge_to", str(merged), *(["--add_tokens", *tokens] if tokens else [])))
    assert not (merged / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == CHATML
    prompts = [chat(row["prompt"], row["completion"]) for row in rows[:2]]
    ids = tokenizer.apply_chat_template(prompts, return_tensors="pt", return_dict=False)
    base = base_of(folder, len(tokenizer) if tokens else None)
    adapter = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged), ids), logits(adapter, ids))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_added_tokens_travel_and_are_trained_on_both_ends(tmp_path, tied):
    folder = tiny_chat_model(tmp_path / "base", template=None, tied=tied)
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    more = ["--add_tokens", *NEW, "--chat_template_path", str(template), "--eos_token", "<|im_end|>"]
    trainer, _ = sft.make_trainer(*sft.parse(line(folder, tmp_path, CHATS, *more)))
    tokenizer = trainer.processing_class
    new = tokenizer.convert_tokens_to_ids(NEW)
    model = trainer.model.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [end.weight.detach().clone() for end in ends]
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {len(value) for key, value in saved.items() if "peft_mask_bits" not in key} == {len(new)}  # rows alone
    for old, end in zip(before, ends, strict=True):
        assert (old != end.weight).any(dim=1).nonzero().flatten().tolist() == new

    travelled = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (travelled.chat_template, travelled.eos_token) == (CHATML, "<|im_end|>")
    ids = torch.tensor([travelled.apply_chat_template(chat("what is oak", "tree"), return_dict=False)])
    assert [(ids == token).sum().item() for token in new] == [2, 2]
    loaded = PeftModel.from_pretrained(base_of(folder, len(travelled)), tmp_path / "out")
    assert torch.equal(logits(loaded, ids), logits(trainer.model, ids))


def test_the_loss_that_trains_new_tokens_is_the_models_own(tmp_path):
    """TRL computes it from the head's weight, which has to have the trained rows in it."""
    folder = tiny_chat_model(tmp_path / "base")
    trainer, _ = trained(folder, tmp_path, "--add_tokens", "<|im_end|>", "--learning_rate", "0.1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.tensor(perplexity(trainer)).log().item(), rel=1e-5)


def test_a_base_in_4_bits_is_merged_into_its_codes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, merged = tiny_chat_model(tmp_path / "base", width=128), tmp_path / "merged"
    more = ["--load_in_4bit", "true", "--target_sparsity", "0.1", "--merge_to", str(merged)]
    sft.main(line(folder, tmp_path, CHATS, *more))
    arguments, settings = sft.parse(line(folder, tmp_path, CHATS, "--load_in_4bit", "true"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = sft.load_model(arguments, settings)
    masks = Masks.load(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(merged, device_map="cpu")

    def weights(model):
        return {
            name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            for name, module in model.named_modules()
            if isinstance(module, bnb.nn.Linear4bit)
        }

    before, after = weights(base), weights(loaded)
    assert set(before) == set(after) == set(masks)
    for name, weight in before.items():
        assert torch.equal(after[name], torch.where(masks[name], weight, 0))
    ids = torch.tensor([tokenizer.apply_chat_template(chat("what is oak", "tree"), return_dict=False)])
    adapter = PeftModel.from_pretrained(base, tmp_path / "out")
    # not as bitsandbytes computes with the codes on a CPU, where it rounds their scales to bfloat16
    plain = sft.dequantized(loaded)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain, ids), logits(adapter, ids), rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(logits(base_of(tmp_path / "plain"), ids), logits(plain, ids))


def test_rows_packed_together_do_not_see_each_other(model, tmp_path):
    trainer, _ = sft.make_trainer(*sft.parse(line(model, tmp_path, CHATS, "--packing", "true", "--max_length", "150")))
    alone, _ = sft.make_trainer(*sft.parse(line(model, tmp_path)))
    assert len(trainer.train_dataset) < len(alone.train_dataset)
    row = trainer.train_dataset[0]
    assert len(row["seq_lengths"]) > 1
    packed = logits_of_batch(trainer, row)
    parts = torch.split(torch.tensor(row["input_ids"]), row["seq_lengths"])
    model = trainer.model
    torch.testing.assert_close(packed, torch.cat([logits(model, part[None]) for part in parts], dim=1))


def logits_of_batch(trainer, row):
    batch = trainer.data_collator([row])
    with torch.no_grad():
        return trainer.model.eval()(**batch).logits


def test_checkpointing_changes_no_zero(model, tmp_path):
    masks = []
    for name, value in (("with", "true"), ("without", "false")):
        (tmp_path / name).mkdir()
        trained(model, tmp_path / name, "--gradient_checkpointing", value)
        masks.append(Masks.load(tmp_path / name / "out"))
    assert masks[0] == masks[1]


@pytest.mark.parametrize("saving", [["no"], ["steps", "--save_steps", "2"]], ids=["at the end", "checkpoints"])
def test_what_is_pushed_has_the_card_of_the_training(model, tmp_path, monkeypatch, saving):
    """TRL writes a card of its own with every checkpoint, and when it pushes."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/pets"))

    def push(self, commit_message="", blocking=True, token=None, revision=None, **about):
        self.create_model_card(model_name="pets", **about)

    monkeypatch.setattr(Trainer, "push_to_hub", push)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    sft.main(line(model, tmp_path, CHATS, "--push_to_hub", "true", "--hub_strategy", "end", "--save_strategy", *saving))
    text = ModelCard.load(tmp_path / "out/README.md").text
    assert text.count("## How it was trained") == text.count("## A mask") == 1


def test_a_resumed_training_ends_as_an_uninterrupted_one(model, tmp_path):
    more = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4"]
    sft.main(line(model, tmp_path, CHATS, *more))
    whole = Masks.load(tmp_path / "out")
    sft.main(line(model, tmp_path, CHATS, *more, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2")))
    assert Masks.load(tmp_path / "out") == whole


@pytest.mark.parametrize("there", [True, False], ids=["an accelerator", "none"])
def test_the_cpu_trains_only_where_there_is_no_accelerator_of_any_make(model, monkeypatch, there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)  # as with MPS and XPU, whatever CUDA is
    _, settings = sft.parse(["--model_name_or_path", model, "--train_file", "chats.jsonl", "--bf16", "false"])
    assert (settings.use_cpu, settings.dataloader_pin_memory) == (not there, torch.cuda.is_available())


def test_the_commands_of_the_page_are_understood():
    page = (Path(__file__).parents[2] / "docs/chat.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m examples\.sft (.*?[^\\])$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) >= 3
    for command in commands:
        arguments, _ = sft.parse([*shlex.split(command.replace("\\\n", " ")), "--use_cpu", "true"])
        assert arguments.model_name_or_path in ("smollm2", "base")
