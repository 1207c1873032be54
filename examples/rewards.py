"""A reward that can be verified: whether the last number of a reply is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(
    r"""
    (?: (?<![\w)]) [-\u2212] )?                    # a minus, unless something stands before it: 7-4 ends in 4
    (?: (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ )     # with thousands apart by commas, or without
        (?: \.\d+ )?
      | (?<![\w.]) \.\d+ )                         # .5
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, exactly: where "8 + 7 = 15" says what it is; None if there is none.

    >>> last_number("so 1,000 of them") == last_number("1000.0")
    True
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\N{MINUS SIGN}", "-")) if found else None


def correct(completions: Sequence[Sequence[dict[str, str]]], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward a reply whose last number is that of the answer, however they are written: 1, or 0.

    Args:
        completions: replies as TRL hands them over, each a chat of one message.
        answer: of each what is right, a text with a number.

    >>> correct([[{"role": "assistant", "content": "It costs 1,000."}]], ["1000"])
    [1.0]
    """
    replies = [last_number(completion[-1]["content"]) for completion in completions]
    return [
        float(number is not None and number == last_number(right))
        for number, right in zip(replies, answer, strict=True)
    ]


def share_right(texts: Sequence[str], answer: Sequence[str]) -> float:
    """Return the share of replies whose last number is that of the answer."""
    return sum(correct([[{"role": "assistant", "content": text}] for text in texts], answer)) / len(texts)
