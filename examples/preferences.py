"""Pairs of replies of which one is preferred: sums that are right and wrong, or files of one's own.

Every error names the file or the option and, where there is one, the row.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from datasets import Dataset

from examples.arithmetic import ANSWER, sums
from examples.problems import question_of
from peft_mask.recipes.chat import FILE_TYPES, as_messages, check_messages, check_rows
from peft_mask.recipes.files import load_file
from peft_mask.recipes.rows import check_filled, source_of

SHIFTS = (-10, -3, -2, -1, 1, 2, 3, 10)  # of a wrong sum from the right one


def sum_pairs(largest: int, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draw different sums of two numbers from 0 to `largest`, each with a right reply and a wrong one.

    A wrong sum is off by 1, 2, 3 or 10 and never below zero; all else of the two replies is the same.

    Returns:
        Rows of `train` and of `test` pairs: "prompt", "chosen" and "rejected", each a chat, and "answer", the right
        number as a text. No two numbers are added in both, in whichever order.

    Raises:
        ValueError: if there are not as many.
    """
    draw = random.Random(seed)

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        words = row["prompt"][-1]["content"].strip("?").split()
        numbers, right = (words[-3], words[-1]), int(row["answer"])
        wrong = right + draw.choice([shift for shift in SHIFTS if right + shift >= 0])
        replies = {
            name: [{"role": "assistant", "content": ANSWER.format(*numbers, number)}]
            for name, number in (("chosen", right), ("rejected", wrong))
        }
        return {"prompt": row["prompt"], **replies, "answer": row["answer"]}

    learned, scored = sums(largest, train, test, seed)
    return Dataset.from_list([pair(row) for row in learned]), Dataset.from_list([pair(row) for row in scored])


def load_pairs(option: str, name: str, tokenizer: Any, stops: Collection[int], max_length: int | None) -> Dataset:
    """Load a file of pairs.

    A row holds `prompt`, a text or a list of messages that ends with the user's, and `chosen` and `rejected`, each a
    text or a list of one message of the assistant.

    Args:
        option: of the command line, which an error names.
        name: CSV, TSV, JSON, JSONL or Parquet file.
        tokenizer: with a chat template, which must take both replies.
        stops: ids of the tokens at which generation ends, one of which must end each reply.
        max_length: number of tokens that a row is cut to.

    Returns:
        Rows of "prompt", "chosen" and "rejected", each a chat.

    Raises:
        ValueError: if the file cannot be read, lacks a column, or a row holds something else.
        FileNotFoundError: if it does not exist.
    """
    rows = load_file(option, name, FILE_TYPES)
    check_filled(rows, ["prompt", "chosen", "rejected"])
    found = []
    columns = (rows[column][:] for column in ("prompt", "chosen", "rejected"))
    for number, (prompt, *replies) in enumerate(zip(*columns, strict=True), 1):
        try:
            found.append({"prompt": question_of(prompt, tokenizer), **_replies(*replies)})
        except ValueError as error:
            raise ValueError(f"{source_of(rows)}: row {number}: {error}") from None
    for column in ("chosen", "rejected"):
        conversations = [row["prompt"] + row[column] for row in found]
        cut = check_rows(f"{source_of(rows)}, column {column!r}", conversations, tokenizer, stops, max_length)
        if cut:
            print(f"{source_of(rows)}: {cut} replies in column {column!r} are cut off at --max_length {max_length}.")
    pairs = Dataset.from_list(found)
    pairs.info.description = source_of(rows)
    return pairs


def _replies(chosen: Any, rejected: Any) -> dict[str, list[Any]]:
    """Return two replies as chats of one message each.

    Raises:
        ValueError: if one is none, or both are the same.
    """
    found = {"chosen": as_messages(chosen, "assistant"), "rejected": as_messages(rejected, "assistant")}
    for column, messages in found.items():
        check_messages(messages)
        if [message["role"] for message in messages] != ["assistant"]:
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise ValueError(
                f"column {column!r} holds {roles}; expected one reply of the assistant, with all before it in 'prompt'."
            )
    if found["chosen"] == found["rejected"]:
        raise ValueError("'chosen' and 'rejected' are the same, so there is nothing to prefer; leave the row out.")
    return found
