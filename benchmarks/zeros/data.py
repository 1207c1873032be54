"""What a language model learns here: texts, scored by perplexity, and answers, scored by exact match as well."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_mask.recipes.causal_lm import pack

BLOCK_SIZE = 128
SPLITS = {"dev": 32, "test": 48}  # blocks of texts that are scored
ANSWERED = {"dev": 300, "test": 600}  # rows with an answer that are scored
IGNORED = -100  # a label that is not scored


@dataclass(frozen=True)
class Rows:
    """Rows of one split, padded on the right.

    Attributes:
        ids: token ids, int64, (rows, tokens).
        labels: the same where a token is scored, else `IGNORED`.
        kept: bool, of the same shape: what is no padding.
    """

    ids: Tensor
    labels: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: Any) -> Rows:
        """Return some of the rows, as wide as the longest of them."""
        width = int(self.kept[chosen].sum(1).max())
        return Rows(*(each[chosen][:, :width] for each in (self.ids, self.labels, self.kept)))

    def batches(self, size: int) -> Iterator[Rows]:
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Data:
    """One thing to learn.

    Attributes:
        splits: `"train"`, `"dev"` and `"test"`.
        has_answers: whether rows have an answer each, and so are scored by exact match, too.
        batch_size: rows of a step.
    """

    name: str
    splits: dict[str, Rows]
    has_answers: bool
    batch_size: int


def texts(folder: Path, tokenizer: Any, field: str = "text") -> Data:
    """Return the texts of a folder's `train.jsonl`, `dev.jsonl` and `test.jsonl`, shuffled and packed in blocks."""
    splits = {
        split: packed(folder / f"{split}.jsonl", tokenizer, field, SPLITS.get(split)) for split in ("train", *SPLITS)
    }
    return Data(folder.name, splits, has_answers=False, batch_size=2)


def packed(file: Path, tokenizer: Any, field: str = "text", blocks: int | None = None) -> Rows:
    """Return the first blocks of a file of texts; every token is scored."""
    lines = [json.loads(line)[field] for line in file.read_text("utf-8").split("\n") if line]
    random.Random(0).shuffle(lines)  # some come sorted by label, and then each text helps to predict the next
    ids = pack(lines, tokenizer, BLOCK_SIZE)[:blocks]
    return Rows(ids, ids, torch.ones_like(ids, dtype=torch.bool))


def intents(folder: Path, tokenizer: Any) -> Data:
    """Return what people ask for, and the name of what they want as the answer: a classification told in words."""
    names = [name.replace("_", " ") for name in json.loads((folder / "labels.json").read_text("utf-8"))]
    splits = {}
    for split in ("train", *SPLITS):
        lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").split("\n") if line]
        random.Random(0).shuffle(lines)
        chosen = lines[: ANSWERED.get(split)]
        splits[split] = answered([(f"{row['text']}\nIntent:", f" {names[row['label']]}") for row in chosen], tokenizer)
    return Data(folder.name, splits, has_answers=True, batch_size=12)


def answered(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Rows:
    """Return prompts with their answers, of which the answers are scored, the end of the text included."""
    texts = [[prompt, answer + tokenizer.eos_token] for prompt, answer in pairs]
    return joined([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


def joined(pairs: Sequence[Sequence[Sequence[int]]]) -> Rows:
    """Return rows of a prompt's and an answer's tokens each, of which the answer's are scored."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    labels, kept = torch.full_like(ids, IGNORED), torch.zeros_like(ids, dtype=torch.bool)
    for number, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[number, :end] = torch.tensor([*prompt, *answer])
        labels[number, len(prompt) : end] = torch.tensor(answer)
        kept[number, :end] = True
    return Rows(ids, labels, kept)
