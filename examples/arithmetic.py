"""Sums of two numbers, asked in a chat: a task whose reward can be verified."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement

from datasets import Dataset

QUESTION, ANSWER = "What is {} + {}?", "{} + {} = {}"
# of every chat: without it a small model rambles, and is seldom right by chance
EXAMPLE = [
    {"role": "user", "content": QUESTION.format(2, 3)},
    {"role": "assistant", "content": ANSWER.format(2, 3, 5)},
]


def sums(largest: int, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draw different sums of two numbers from 0 to `largest`, for training and held out.

    Returns:
        Rows of `train` and of `test` problems: "prompt", a chat of an example and the question, and "answer", the
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
        question = {"role": "user", "content": QUESTION.format(a, b)}
        rows.append({"prompt": [*EXAMPLE, question], "answer": str(a + b)})
    return Dataset.from_list(rows[:train]), Dataset.from_list(rows[train:])
