"""Problems of one's own for reinforcement learning: files of prompts, each with the number that answers it.

Every error names the file or the option and, where there is one, the row.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from examples.rewards import last_number
from peft_mask.recipes.chat import FILE_TYPES, Message, as_messages, check_messages, render
from peft_mask.recipes.files import load_file
from peft_mask.recipes.rows import check_filled, source_of


def load_problems(option: str, name: str, tokenizer: Any) -> Dataset:
    """Load a file of problems.

    A row holds `prompt`, a text or a list of messages that ends with the user's, and `answer`, a number or a text whose
    last number it is.

    Args:
        option: of the command line, which an error names.
        name: CSV, TSV, JSON, JSONL or Parquet file.
        tokenizer: with a chat template, which must take the prompts.

    Returns:
        Rows of "prompt", a chat, and "answer", the number as a text.

    Raises:
        ValueError: if the file cannot be read, lacks a column, or a row holds something else.
        FileNotFoundError: if it does not exist.
    """
    rows = load_file(option, name, FILE_TYPES)
    check_filled(rows, ["prompt", "answer"])
    found = []
    for number, (prompt, answer) in enumerate(zip(rows["prompt"][:], rows["answer"][:], strict=True), 1):
        try:
            found.append({"prompt": question_of(prompt, tokenizer), "answer": number_of(answer)})
        except ValueError as error:
            raise ValueError(f"{source_of(rows)}: row {number}: {error}") from None
    problems = Dataset.from_list(found)
    problems.info.description = source_of(rows)
    return problems


def question_of(prompt: Any, tokenizer: Any) -> list[Message]:
    """Return a prompt as a chat.

    Raises:
        ValueError: if it is none, does not end with the user's message, or the chat template refuses it.
    """
    messages = as_messages(prompt, "user")
    check_messages(messages)
    if not messages or messages[-1]["role"] != "user":
        last = f"is of the {messages[-1]['role']}" if messages else "is missing"
        raise ValueError(f"the last message of the prompt {last}; expected the user's, as a reply is to follow it.")
    try:
        render(tokenizer, messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the prompt: {error}.") from None
    return messages


def number_of(answer: Any) -> str:
    """Return the number that an answer is, or of a text the last in it.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        text = f"{Decimal(str(answer)):f}"  # 1e+20 in digits
    else:
        text = answer if isinstance(answer, str) else ""
    if (number := last_number(text)) is None:
        raise ValueError(
            f"the answer {answer!r:.60} holds no number; expected one, as 42, '1,000' or a text that ends in it. Leave "
            "rows without out."
        )
    return f"{number:f}"


def take(rows: Dataset, option: str, count: int | None) -> Dataset:
    """Return the first rows, or all if no number is given.

    Raises:
        ValueError: if there are not as many.
    """
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise ValueError(f"--{option} {count}: {source_of(rows)} has {len(rows)} rows for that; give 1 to as many.")
    return rows.select(range(count))


def hold_out(rows: Dataset, count: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Return rows to learn from, and others to be scored, chosen by the seed: a tenth if no number is given.

    Raises:
        ValueError: if nothing is left to learn from, or to be scored.
    """
    if len(rows) < 2:
        raise ValueError(f"{source_of(rows)}: one row cannot be both learned and held out; give --test_file.")
    if count is not None and not 1 <= count < len(rows):
        raise ValueError(
            f"--test_problems {count}: {source_of(rows)} has {len(rows)} rows, of which one at least is to learn from; "
            f"give 1 to {len(rows) - 1}, or a --test_file."
        )
    parts = rows.train_test_split(test_size=0.1 if count is None else count, seed=seed)
    return parts["train"], parts["test"]
