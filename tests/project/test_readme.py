"""The README: its six lines on other architectures than its own, and what a newcomer must find in it."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_mask import MaskConfig
from tests.project.test_documents import blocks_of
from tests.tiny_models import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def six_lines() -> str:
    """The block that trains a mask where a LoRA was trained, without its imports."""
    source = next(block.source for block in blocks_of(ROOT / "README.md") if "MaskConfig(" in block.source)
    assert len(re.findall(r"^\S", source, flags=re.MULTILINE)) == 6
    return source


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama", "t5"])
def test_the_six_lines_train_other_architectures(family, tmp_path, monkeypatch):
    base = tiny_model(family)
    inputs = tiny_inputs(base, labels=True)
    rows = [{name: values[i] for name, values in inputs.items()} for i in range(len(inputs["input_ids"]))]
    namespace = {"base": base, "rows": rows, "tokenizer": None, "get_peft_model": get_peft_model}
    namespace |= {"Trainer": Trainer, "TrainingArguments": TrainingArguments}
    monkeypatch.chdir(tmp_path)
    exec(six_lines(), namespace)
    merged = PeftModel.from_pretrained(tiny_model(family), "adapter").merge_and_unload()
    assert type(merged) is type(tiny_model(family))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_first_screen_says_when_not_to_use_it_and_that_no_gpu_has_run_it():
    first_screen = "\n".join(README.splitlines()[:30])
    assert "Do not take it when" in first_screen
    assert "GPUs: none has run it yet" in first_screen
    assert "GRPO" in first_screen


@pytest.mark.parametrize(
    "word", ["r", "lora_alpha", "learning rate", "target_modules", "lora_dropout", "modules_to_save"]
)
def test_the_readme_says_what_becomes_of_a_word_of_lora(word):
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert any(re.search(rf"(`{word}`|{word})", row.split("|")[1]) for row in rows)


def test_every_field_of_lora_has_a_row_in_the_page_about_it():
    page = (ROOT / "docs" / "from-lora.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    missing = {field.name for field in dataclasses.fields(LoraConfig)} - set(re.findall(r"`(\w+)`", rows))
    assert missing == set()


def test_what_the_page_about_lora_calls_the_same_is_a_field_of_a_mask():
    page = (ROOT / "docs" / "from-lora.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    same = {name for lora, mask in rows if mask.strip().startswith("the same") for name in re.findall(r"`(\w+)`", lora)}
    fields = {field.name for field in dataclasses.fields(MaskConfig)}
    assert "target_modules" in same
    assert same <= fields
    gone = {name for lora, mask in rows if mask.strip().startswith("none") for name in re.findall(r"`(\w+)`", lora)}
    assert gone & fields == set()
