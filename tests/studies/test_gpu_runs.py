"""The runs that wait for a GPU: what they take, their data and rewards, and the commands of the page."""

import json
import subprocess
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser
from trl import ScriptArguments as TrlArguments

from benchmarks import gpu_runs, gsm8k
from benchmarks.metamath import __main__ as metamath
from examples import grpo
from examples.rewards import correct
from peft_mask.recipes import sft
from tests.project.test_documents import ROOT, blocks_of
from tests.versions import RUNS_ON_META

PAGE = ROOT / "docs" / "gpu-runs.md"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"question": "Ann has 40 pens and buys 2.", "answer": "She has 40+2=<<40+2=42>>42.\n#### 42"},
    {"question": "A car costs 1,000.", "answer": "It costs 1000.\n#### 1,000"},
    {"question": "It was 1 degree and fell by 4.", "answer": "1-4=<<1-4=-3>>-3\n#### -3"},
] * 4
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


def commands():
    """What the page's shell blocks run, loops unrolled: (program, arguments)."""
    names = ("python", "trl", "lm_eval", "git", "pip", "hf")
    say = "".join(f"{name}() {{ printf '%s\\037' {name} \"$@\"; echo; }}\n" for name in names)
    found = []
    for block in blocks_of(PAGE):
        if block.language == "bash":
            run = subprocess.run(["bash", "-eu"], input=say + block.source, capture_output=True, text=True, check=True)
            found += [tuple(line.strip("\037").split("\037")) for line in run.stdout.splitlines()]
    return found


def kind_of(command):
    program, *rest = command
    return " ".join([program, *rest[1:3]]) if program == "python" else " ".join([program, *rest[:1]])


def parse(command):
    on_a_cpu = ["--use_cpu", "true"]  # or what asks for bfloat16 is refused where there is no GPU
    program, *rest = command
    if program == "trl":
        return TrlParser((TrlArguments, SFTConfig, ModelConfig)).parse_args_and_config([*rest[1:], *on_a_cpu])
    if program != "python":
        return None
    module, arguments = rest[1], rest[2:]
    if module == "examples.sft":
        return HfArgumentParser((sft.ScriptArguments, SFTConfig)).parse_args_into_dataclasses([*arguments, *on_a_cpu])
    if module == "benchmarks.metamath":
        return metamath.parse(arguments)
    if module == "examples.grpo":
        return HfArgumentParser((grpo.ScriptArguments, GRPOConfig)).parse_args_into_dataclasses([*arguments, *on_a_cpu])
    return gsm8k.parse(arguments)


def test_the_commands_of_the_page_are_understood():
    found = commands()
    for command in found:
        parse(command)
    counts = Counter(kind_of(command) for command in found)
    runs = len(gpu_runs.MODELS) * 3
    assert counts["python benchmarks.metamath ../peft"] == 1
    assert counts["python examples.grpo --model_name_or_path"] == 2 * runs
    assert counts["python examples.sft --model_name_or_path"] == counts["trl sft"] == runs
    assert counts["python benchmarks.gsm8k score"] == 2 * runs


def test_the_commands_of_the_page_name_the_models_that_are_counted():
    named = {word for command in commands() for word in command if word.endswith("-Instruct")}
    assert {name.partition("/")[2].removesuffix("-Instruct") for name in named} == set(gpu_runs.MODELS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a tiny model that spells, with a chat template, and one of chats."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = ["\n", *map(chr, range(32, 127))]
    spelling = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    spelling.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY, **ids)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def chats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gsm8k, "load_dataset", lambda *_: {"train": ROWS, "test": ROWS[:3]})
    gsm8k.main(["data", str(tmp_path / "gsm8k")])
    assert "train.jsonl: 12 chats" in capsys.readouterr().out
    return tmp_path / "gsm8k"


def started(command, chats, tiny, tmp_path):
    """The page's command on a tiny model: its arguments, and after them those that make it short."""
    arguments = [word.replace("gsm8k/", f"{chats}/") for word in command[3:]]
    short = {
        "--model_name_or_path": tiny / "model",
        "--max_steps": 1,
        "--per_device_train_batch_size": 2,
        "--gradient_accumulation_steps": 1,
        "--output_dir": tmp_path / "run",
        "--use_cpu": True,
    }
    return [*arguments, *(str(word) for pair in short.items() for word in pair)]


@pytest.mark.parametrize("method", ["mask", "full"])
def test_grpo_starts_as_the_page_says(method, chats, tiny, tmp_path, monkeypatch):
    def varied(completions, answer, **_):  # an untrained model is never right, and of equal rewards nothing is learned
        return [float(len(set(reply[-1]["content"]))) for reply in completions]

    monkeypatch.setattr(grpo, "correct", varied)
    command = next(c for c in commands() if c[2] == "examples.grpo" and method in c)
    own = {"--num_generations": 2, "--max_completion_length": 8, "--train_problems": 4}
    grpo.main([*started(command, chats, tiny, tmp_path), *(str(word) for pair in own.items() for word in pair)])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == method
    assert results["steps"] == 1
    assert [results[name] for name in ("data", "train_problems", "test_problems")] == ["test.jsonl", 4, 3]


def test_sft_starts_as_the_page_says_and_its_merged_model_is_scored(chats, tiny, tmp_path, capsys):
    command = next(c for c in commands() if c[2] == "examples.sft")
    arguments = started(command, chats, tiny, tmp_path)
    sft.main([*arguments, "--merge_to", str(tmp_path / "merged")])
    gsm8k.main(["score", str(chats), "--model", str(tmp_path / "merged"), "--max_new_tokens", "4"])
    assert "merged: 0.00% of the answers are right" in capsys.readouterr().out


def test_chats_ask_for_the_form_of_the_answers_that_they_hold():
    (chat, *_) = gsm8k.as_chats(ROWS)
    assert chat["prompt"][0]["content"].startswith(ROWS[0]["question"])
    assert chat["completion"][0]["content"] == "She has 40+2=42.\n#### 42"
    assert gsm8k.ANSWER.strip() in chat["prompt"][0]["content"]


def test_the_completions_of_the_data_are_right_by_its_answers_and_others_are_not():
    chats = gsm8k.as_chats(ROWS[:3])
    assert [chat["answer"] for chat in chats] == ["42", "1,000", "-3"]
    replies = [chat["completion"] for chat in chats]
    assert correct(replies, [chat["answer"] for chat in chats]) == [1.0, 1.0, 1.0]
    assert correct(replies, ["41", "1", "3"]) == [0.0, 0.0, 0.0]


@pytest.mark.skipif(not RUNS_ON_META, reason="this transformers' Llama does not run without weights")
def test_what_runs_take_is_told_for_each_model(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_runs, "METAMATH", ("tiny", (2, 8)))
    monkeypatch.setitem(gpu_runs.MODELS, "tiny", {"model_type": "llama", "vocab_size": 96, **TINY})
    gpu_runs.main(["--models", "tiny", "--results", str(tmp_path)])
    figures = json.loads((tmp_path / "gpu-runs.json").read_text())["figures"]["models"]["tiny"]
    assert figures["masked"] == 2 * 32 * 64
    assert figures["cache_bytes"] == 2 * 2 * 2 * 2 * 8 * 64 * 768
    steps = figures["step_bytes"]
    held = 2 * figures["weights"]  # bytes that the dtypes of full fine-tuning differ by, four times
    assert steps["SFT, full fine-tuning in float32"] - steps["SFT, full fine-tuning in bfloat16"] == 4 * held


def test_a_step_is_told_the_smallest_card_that_it_fits():
    assert [gpu_runs.cards_for(size * 2**30) for size in (1, 22, 70, 76)] == ["24 GB", "80 GB", "80 GB", "none of them"]
