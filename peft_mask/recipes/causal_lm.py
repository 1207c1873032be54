"""Learn a mask for plain text, with any causal language model: files of texts -> blocks of tokens -> perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

from peft_mask.recipes.files import load_file
from peft_mask.recipes.rows import source_of, type_of
from peft_mask.recipes.script import DataArguments, Task, used_splits

FILE_TYPES = {
    ".csv": "table",
    ".tsv": "table",
    ".json": "json",
    ".jsonl": "json lines",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass
class CausalArguments(DataArguments):
    """Model, data, and how texts become blocks."""

    file_types: ClassVar[Mapping[str, str]] = FILE_TYPES
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int = field(default=128, metadata={"help": "Texts are joined and cut into blocks of this many tokens."})


def load_texts(option: str, name: str, column: str) -> Dataset:
    """Load the rows of a file that have a text.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if its type is unknown, or the column is missing or holds something else than texts.
    """
    return with_texts(load_file(option, name, FILE_TYPES), column)


def with_texts(rows: Dataset, column: str) -> Dataset:
    """Return the rows that have a text.

    Raises:
        ValueError: if the column is missing, holds something else than texts, or is empty in every row.
    """
    source = source_of(rows)
    if column not in rows.column_names:
        raise ValueError(
            f"{source}: there is no column {column!r}, the file has {rows.column_names}; see --text_column."
        )
    if (kind := type_of(rows, column)) not in ("string", "large_string"):
        raise ValueError(f"{source}: column {column!r} holds {kind}, not texts; see --text_column.")
    filled = rows.filter(bool, input_columns=column)
    if len(filled) == 0:
        raise ValueError(f"{source}: column {column!r} is empty in every row; expected texts.")
    return filled


def hold_out(rows: Dataset, seed: int) -> dict[str, Dataset]:
    """Split a tenth of the rows off as "test".

    Raises:
        ValueError: if there is one row alone.
    """
    if len(rows) < 2:
        raise ValueError(
            f"{source_of(rows)}: one text cannot be both learned and held out; add texts, or give --test_file(s)."
        )
    return dict(rows.train_test_split(test_size=0.1, seed=seed))


def pack(texts: Iterable[str], tokenizer: Any, block_size: int) -> torch.Tensor:
    """Join texts, an end-of-text token after each, and cut the tokens into blocks; what does not fill one is left out.

    Returns:
        int64 of shape (blocks, block_size).

    Raises:
        ValueError: if the tokenizer has no such token, or the texts do not fill a block.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): take the one of a causal language model.")
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([*chain.from_iterable([*text, tokenizer.eos_token_id] for text in ids)], dtype=torch.long)
    if len(tokens) < block_size:
        raise ValueError(
            f"{len(ids)} texts have {len(tokens)} tokens, less than one block: lower --block_size {block_size}."
        )
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def as_dataset(blocks: torch.Tensor) -> Dataset:
    """Make of blocks what Trainer takes; the model itself shifts the labels by one token."""
    return Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})


def prepare(splits: dict[str, Dataset], tokenizer: Any, arguments: CausalArguments, seed: int) -> Task:
    """Make the task of the splits.

    Raises:
        ValueError: if a column is missing or empty, or the texts of a split do not fill a block.
    """
    column = arguments.text_column
    for name in splits:
        splits[name] = with_texts(splits[name], column)
    test = next((name for name in ("test", "validation") if name in splits), None)
    if test is None:
        splits.update(hold_out(splits["train"], seed))
        test = "test"
        print("no test or validation split: a tenth of the training rows is held out for the test.")
    data = {
        name: as_dataset(pack(splits[name][column], tokenizer, arguments.block_size))
        for name in used_splits(splits, test)
    }
    return Task(AutoModelForCausalLM, "CAUSAL_LM", data, test, default_data_collator, None, None, "text-generation")


def score(trainer: Trainer, task: Task, arguments: DataArguments) -> dict[str, float]:
    """Return the perplexity of the texts to score, with and without the mask: exp(mean negative log-likelihood)."""

    def perplexity() -> float:
        return math.exp(trainer.evaluate(task.data[task.test], metric_key_prefix="test")["test_loss"])

    with_mask = perplexity()
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        return {"perplexity": with_mask, "perplexity_without_mask": perplexity()}
