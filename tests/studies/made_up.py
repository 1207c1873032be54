"""A tiny encoder and a few rows of tasks, for studies that are tested end to end."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from benchmarks.accuracy import runs

WORDS = ["red", "green", "blue", "runs", "sleeps", "un", "##happy", "the", "a"]
STEPS = 3


def save_model(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


def write_split(folder: Path, name: str, split: str, count: int) -> None:
    if name == "trec":
        rows = [{"text": f"the {WORDS[i % 5]} " * (1 + i % 3), "label": i % 3} for i in range(count)]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        sentence = "the\tDT\tX\nred\tJJ\tNOUN\nunhappy\tJJ\tNOUN\nruns\tVB\tVERB\n\n"
        (folder / name / f"{split}.conll").write_text(sentence * count, "utf-8")


def results_in(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return runs.runs_in(folder).read()
