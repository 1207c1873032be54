"""GSM8K for the scripts of examples/: the same questions for SFT and for GRPO, and one way to score what they make.

python -m benchmarks.gsm8k data FOLDER                      # from the Hub: train.jsonl and test.jsonl, chats
python -m benchmarks.gsm8k score FOLDER --model MODEL       # how many answers of an ordinary model are right

docs/gpu-runs.md says what for.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.problems import load_problems
from examples.rewards import share_right
from peft_mask.recipes.answers import greedy_answers

HUB_NAME = "openai/gsm8k"
ASK = "{} Think step by step, and end with #### and the number."
ANSWER = "#### "
_CALCULATION = re.compile(r"<<.*?>>")  # notes for a calculator, which are no part of the answer


def as_chats(rows: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """Make chats of rows with a `question` and an `answer`.

    Returns:
        Rows of `prompt` and `completion`, which TRL's SFT and `examples.sft` take, and `answer`, the number alone, for
        `examples.grpo`.
    """
    return [
        {
            "prompt": [{"role": "user", "content": ASK.format(row["question"])}],
            "completion": [{"role": "assistant", "content": _CALCULATION.sub("", row["answer"])}],
            "answer": row["answer"].rpartition(ANSWER)[-1],
        }
        for row in rows
    ]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in load_dataset(HUB_NAME, "main").items():
        lines = [json.dumps(chat) for chat in as_chats(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{folder / split}.jsonl: {len(lines):,} chats")


def score(folder: Path, name: str, length: int, batch: int) -> float:
    """Return the share of right greedy answers of a model to the test questions."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
    rows = load_problems("test_file", str(folder / "test.jsonl"), tokenizer)
    return share_right(greedy_answers(model, tokenizer, rows["prompt"][:], batch, length), rows["answer"][:])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "score"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["score"].add_argument("--model", required=True, help="an ordinary model: merged, or trained whole")
    commands.choices["score"].add_argument("--max_new_tokens", type=int, default=400)
    commands.choices["score"].add_argument("--batch_size", type=int, default=64)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.command == "data":
        write(options.folder)
    else:
        right = score(options.folder, options.model, options.max_new_tokens, options.batch_size)
        print(f"{options.model}: {right:.2%} of the answers are right")


if __name__ == "__main__":
    main()
