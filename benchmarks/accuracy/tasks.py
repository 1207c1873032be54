"""The tasks: a table of rows, and how a file of examples becomes batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from peft_mask.recipes.tagging import IGNORED, label_last_pieces, read_columns

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Task:
    """One row: where the examples lie, what is predicted, and the budget.

    `name` is the folder below the data folder. `SEQ_CLS` reads JSON lines `{"text", "label"}`; `TOKEN_CLS` reads
    tab-separated columns, the token first and the tag last, a blank line between sentences. `max_length` counts word
    pieces; what lies beyond is cut off, and a word cut off counts as wrong.
    """

    name: str
    task_type: Literal["SEQ_CLS", "TOKEN_CLS"]
    steps: int
    max_length: int = 128

    def label_names(self, data: Path) -> list[str]:
        return json.loads(self.file(data, "labels.json").read_text("utf-8"))

    def file(self, data: Path, name: str) -> Path:
        """One of the task's files below the folder `data`."""
        path = data / self.name / name
        if not path.is_file():
            raise FileNotFoundError(
                f"task '{self.name}' needs the file '{path}', which is not there: benchmarks/README.md says what the "
                "folder of --data holds, docs/reproduction.md where custrev and tweets come from."
            )
        return path


TASKS = {
    task.name: task
    for task in (
        Task("banking77", "SEQ_CLS", steps=200),
        Task("trec", "SEQ_CLS", steps=150),
        Task("sst2", "SEQ_CLS", steps=150),
        Task("ud_ewt_pos", "TOKEN_CLS", steps=100),
        Task("ag_news", "SEQ_CLS", steps=100),
        Task("clinc150", "SEQ_CLS", steps=200),
    )
}


@dataclass(frozen=True)
class Rows:
    """The word pieces of one split and, for each row, a label (classification) or one label a piece (tagging).

    `labelled` counts the labels in the file, so that words which truncation cut off stay in the denominator.
    """

    pieces: list[list[int]]
    labels: list[Any]
    labelled: int
    pad: int

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs for these rows, padded to the longest of them."""
        width = max(len(self.pieces[i]) for i in indices)
        ids = np.full((len(indices), width), self.pad, np.int64)
        attention = np.zeros((len(indices), width), np.int64)
        tagging = isinstance(self.labels[0], list)
        labels = np.full((len(indices), width) if tagging else len(indices), IGNORED, np.int64)
        for row, i in enumerate(indices):
            length = len(self.pieces[i])
            ids[row, :length] = self.pieces[i]
            attention[row, :length] = 1
            if tagging:
                labels[row, :length] = self.labels[i]
            else:
                labels[row] = self.labels[i]
        arrays = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def in_order_of_length(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """All rows once, shortest first: the cheapest order to evaluate in."""
        order = sorted(range(len(self.pieces)), key=lambda i: len(self.pieces[i]))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


@lru_cache(maxsize=8)
def load_rows(task: Task, split: Split, model: str, data: Path) -> Rows:
    """Reads one split of `task` below the folder `data`, in the word pieces of `model`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if task.task_type == "SEQ_CLS":
        path = task.file(data, f"{split}.jsonl")
        examples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts = [example["text"] for example in examples]
        pieces = tokenizer(texts, truncation=True, max_length=task.max_length)["input_ids"]
        return Rows(pieces, [example["label"] for example in examples], len(examples), tokenizer.pad_token_id)
    index = {name: i for i, name in enumerate(task.label_names(data))}
    sentences = read_columns(task.file(data, f"{split}.conll"))
    words = [[word for word, _ in sentence] for sentence in sentences]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=task.max_length)
    labels = [
        label_last_pieces(encoded.word_ids(row), [index[tag] for _, tag in sentence])
        for row, sentence in enumerate(sentences)
    ]
    return Rows(encoded["input_ids"], labels, sum(map(len, sentences)), tokenizer.pad_token_id)


def training_batches(rows: Rows, seed: int, steps: int, batch_size: int) -> Iterator[list[int]]:
    """Row indices of `steps` batches, the same for every method: a function of `rows`, `seed` and the budget alone.

    Each epoch is shuffled, sorted by length inside groups of 32 batches (so that little padding is computed), and the
    batches are shuffled again.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if len(rows.pieces) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many rows, the training split has {len(rows.pieces)}")
    rng = np.random.default_rng(seed)
    done = 0
    while done < steps:
        shuffled = rng.permutation(len(rows.pieces))
        groups = [shuffled[i : i + 32 * batch_size] for i in range(0, len(shuffled), 32 * batch_size)]
        order = [int(i) for group in groups for i in sorted(group, key=lambda i: len(rows.pieces[i]))]
        batches = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
        for b in rng.permutation(len(batches))[: steps - done]:
            yield batches[b]
            done += 1
