"""What people do, as rows of one table: each is tried with LoRA and with a mask, and must end as the row says.

A new situation is one function under `@situation`. `python -m tests.situations` writes the table to docs/situations.md.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.situations.methods import METHODS, Method

Outcome = Literal["right", "refused", "wrong"]
RANK: dict[str, int] = {"wrong": 0, "refused": 1, "right": 2}  # wrong without a word is the worst


@dataclass(frozen=True)
class Situation:
    """One row.

    Attributes:
        part: the heading it stands under.
        told: what somebody does, in a sentence that ends in what is right.
        lora: how it ends with LoRA; "wrong" is wrong without an error.
        mask: how it ends with a mask.
        lora_refusal: what LoRA's error says, where it is refused; a pattern.
        refusal: what the mask's error says, where it is refused; a pattern.
        do: does it in a folder and returns whether the result was right; errors are refusals.
        slow: whether it takes more than a few seconds.
    """

    part: str
    told: str
    lora: Outcome
    mask: Outcome
    lora_refusal: str
    refusal: str
    do: Callable[[Method, Path], bool]
    slow: bool = False

    def refusal_of(self, method: str) -> str:
        """What the error of one method says; empty where there is none."""
        return self.lora_refusal if method == "lora" else self.refusal

    @property
    def verdict(self) -> str:
        """How a mask ends beside LoRA."""
        difference = RANK[self.mask] - RANK[self.lora]
        return "better" if difference > 0 else "worse" if difference else "equal"

    def tried(self, method: str) -> tuple[Outcome, str]:
        """Do it with one method; the outcome, and the message of the error if there was one."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return ("right" if self.do(METHODS[method], Path(folder)) else "wrong"), ""
            except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
                return "refused", f"{type(error).__name__}: {error}"


SITUATIONS: list[Situation] = []


def situation(
    part: str,
    told: str,
    *,
    lora: Outcome,
    mask: Outcome,
    lora_refusal: str = "",
    refusal: str = "",
    slow: bool = False,
) -> Callable[[Callable[[Method, Path], bool]], Callable[[Method, Path], bool]]:
    """Make a row of the function below."""

    def add(do: Callable[[Method, Path], bool]) -> Callable[[Method, Path], bool]:
        SITUATIONS.append(Situation(part, told, lora, mask, lora_refusal, refusal, do, slow))
        return do

    return add


def page(rows: Sequence[Situation]) -> str:
    """The table in Markdown."""
    verdicts = [row.verdict for row in rows]
    better, equal, worse = (verdicts.count(verdict) for verdict in ("better", "equal", "worse"))
    lines = [
        "# What people do every day: LoRA and mask compared",
        "",
        "Each row was met by somebody with an adapter of some method. A test tries it with LoRA and with a mask, on a",
        "tiny model, and holds both to what stands here. *Refused* is an error; *wrong* is wrong without one.",
        "",
        f"In {len(rows)} situations a mask ends better than LoRA {better} times, alike {equal}, worse {worse}.",
    ]
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", f"## {part}", "", "| situation | LoRA | mask |", "|---|---|---|"]
        lines += [f"| {row.told} | {row.lora} | {_bold(row)} |" for row in rows if row.part == part]
    return "\n".join(lines) + "\n"


def _bold(row: Situation) -> str:
    return f"**{row.mask}**" if row.verdict == "better" else row.mask
