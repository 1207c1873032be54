"""Sums of two numbers, asked in a chat: a task whose reward can be verified."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

from datasets import Dataset

QUESTION = "What is {} + {}? Reply with only the number."
_NUMBER = re.compile(r"\d+")

Chat = list[dict[str, str]]


def problems(largest: int, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draw different sums of two numbers from 0 to `largest`, for training and held out.

    Returns:
        Rows of `train` and of `test` problems: "prompt", a chat that ends with the question, and "answer", the
        number as a text. No two numbers are added in both, in whichever order.

    Raises:
        ValueError: if there are not as many.
    """
    pairs = list(combinations_with_replacement(range(max(largest, -1) + 1), 2))
    if min(train, test) < 1 or train + test > len(pairs):
        raise ValueError(
            f"--train_problems {train} and --test_problems {test}: expected at least one each, and no more than "
            f"{len(pairs)} together, which is how many sums there are of two numbers up to {largest}. Lower them, or "
            "raise --largest."
        )
    draw = random.Random(seed)
    rows = []
    for pair in draw.sample(pairs, train + test):
        a, b = draw.sample(pair, 2)  # in either order
        rows.append({"prompt": [{"role": "user", "content": QUESTION.format(a, b)}], "answer": str(a + b)})
    return Dataset.from_list(rows[:train]), Dataset.from_list(rows[train:])


def last_number(reply: str) -> str | None:
    """Return the last number in a reply, without leading zeros: where "8 + 7 = 15" says what it is; None if none is."""
    found = _NUMBER.findall(reply)
    return str(int(found[-1])) if found else None


def correct(completions: Sequence[Chat], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward a reply whose last number is the sum."""
    return [float(last_number(_text(reply)) == right) for reply, right in zip(completions, answer, strict=True)]


def terse(completions: Sequence[Chat], **_: Any) -> list[float]:
    """Reward a reply that is a number and nothing else, be it right or wrong."""
    return [float(_NUMBER.fullmatch(_text(reply).strip()) is not None) for reply in completions]


def _text(completion: Chat) -> str:
    return completion[-1]["content"]
