"""docs/train.md: every file that it shows is trained, on tiny models and with two steps."""

import json
import re

import pytest
import yaml

from tests.chat_models import CHATS, tiny_chat_model, write
from tests.project.test_documents import ROOT, blocks_of

PAGE = ROOT / "docs" / "train.md"
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL))


def test_the_page_shows_a_file_for_each_task():
    assert sorted(yaml.safe_load(text)["task"] for text in FILES.values()) == [
        "causal-lm",
        "chat",
        "text-classification",
        "token-classification",
    ]
    assert len(FILES) == len([block for block in blocks_of(PAGE) if block.language == "yaml"])


@pytest.mark.parametrize("name", sorted(FILES))
def test_each_file_of_the_page_trains(name, run, tiny_bert, tmp_path, monkeypatch):
    if name == "chat.yaml":
        pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / name).write_text(FILES[name])
    write(tmp_path / "chats.jsonl", CHATS)
    speaks = name in ("text.yaml", "chat.yaml")
    model = tiny_chat_model(tmp_path / "tiny") if speaks else tiny_bert
    said = run("train", name, "--model_name_or_path", model, "--max_steps", "2", "--use_cpu", "true", "--json")
    assert said.code == 0, said.err
    assert (tmp_path / json.loads(said.out)["out"] / "adapter_model.safetensors").is_file()


def test_the_conversation_of_the_page_is_one_that_is_taken(run, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    row = next(block.source for block in blocks_of(PAGE) if block.language == "json")
    (tmp_path / "chats.jsonl").write_text(row * 4)
    (tmp_path / "chat.yaml").write_text(FILES["chat.yaml"])
    model = tiny_chat_model(tmp_path / "tiny")
    assert run("train", "chat.yaml", "--model_name_or_path", model, "--max_steps", "1", "--use_cpu", "true").code == 0


def test_what_is_refused_is_refused_in_the_words_of_the_page(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,b\nc,d\n,d\n")
    said = {"task": "text-classification", "model_name_or_path": "m", "train_file": "train.csv", "use_cpu": True}
    (tmp_path / "banking").mkdir()
    (tmp_path / "banking" / "adapter_config.json").write_text("{}")
    shown = [line for block in blocks_of(PAGE) for line in block.source.splitlines() if ": error: " in line]
    for own, line in zip(
        ({"output_dir": "out", "target_sparcity": 0.1}, {"output_dir": "out"}, {"output_dir": "banking"}),
        shown,
        strict=True,
    ):
        (tmp_path / "classify.yaml").write_text(yaml.safe_dump(said | own))
        if "row 3" in line:
            monkeypatch.setattr("peft_mask.recipes.script.pretrained", lambda *_: None)  # the rows are read before it
        assert refused("train", "classify.yaml") == line
