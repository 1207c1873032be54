"""GSM8K for the scripts of examples/: the same questions for SFT and for GRPO, and one way to score what they make.

python -m benchmarks.gsm8k data FOLDER                      # from the Hub: train.jsonl and test.jsonl, chats
python -m benchmarks.gsm8k grpo FOLDER ...                  # examples.grpo on them; ... are its arguments
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
from unittest import mock

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import grpo
from examples.card import write_card

HUB_NAME = "openai/gsm8k"
ASK = "{} Think step by step, and end with #### and the number."
ANSWER = "#### "
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CALCULATION = re.compile(r"<<.*?>>")  # notes for a calculator, which are no part of the answer


def as_chats(rows: Iterable[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    """Make chats of rows with a `question` and an `answer`, in the columns that TRL and `examples.sft` take."""
    return [
        {
            "prompt": [{"role": "user", "content": ASK.format(row["question"])}],
            "completion": [{"role": "assistant", "content": _CALCULATION.sub("", row["answer"])}],
        }
        for row in rows
    ]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in load_dataset(HUB_NAME, "main").items():
        lines = [json.dumps(chat) for chat in as_chats(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{folder / split}.jsonl: {len(lines):,} chats")


def problems(folder: Path, split: str, count: int | None = None) -> Dataset:
    """Read chats as GRPO takes them: "prompt", and "answer", the number that the completion ends in.

    Raises:
        ValueError: if there are not as many.
    """
    lines = (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
    if count is not None and not 1 <= count <= len(lines):
        raise ValueError(f"--{split}_problems {count}: {folder / split}.jsonl has {len(lines)}; give 1 to as many.")
    rows = [json.loads(line) for line in lines[:count]]
    answers = [row["completion"][0]["content"].rpartition(ANSWER)[-1] for row in rows]
    return Dataset.from_list([{"prompt": r["prompt"], "answer": a} for r, a in zip(rows, answers, strict=True)])


def last_number(text: str) -> float | None:
    """Return the last number in a text, whose thousands may be set apart by commas; None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def correct(completions: Sequence[list[dict[str, str]]], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward a reply whose last number is the answer."""
    replies = [last_number(reply[-1]["content"]) for reply in completions]
    return [float(number == last_number(right)) for number, right in zip(replies, answer, strict=True)]


def run_grpo(folder: Path, argv: Sequence[str]) -> Any:
    """Run `examples.grpo` with these problems and this reward in the place of its sums, and a card that says so."""

    def these(_: int, train: int, test: int, __: int) -> tuple[Dataset, Dataset]:
        return problems(folder, "train", train), problems(folder, "test", test)

    def card(output: Path, command: str, task: str, _: str, **known: Any) -> None:
        here = command.replace("examples.grpo", f"benchmarks.gsm8k grpo {folder}", 1)
        write_card(output, here, task, HUB_NAME, **known)

    with mock.patch.multiple(grpo, problems=these, correct=correct, write_card=card):
        return grpo.main(argv)


@torch.inference_mode()
def score(folder: Path, name: str, length: int, batch: int) -> float:
    """Return the share of right greedy answers of a model to the test questions."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
    rewards: list[float] = []
    for rows in problems(folder, "test").iter(batch):
        inputs = tokenizer.apply_chat_template(
            rows["prompt"], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += correct([[{"role": "assistant", "content": text}] for text in texts], rows["answer"])
    return sum(rewards) / len(rewards)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "grpo", "score"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["score"].add_argument("--model", required=True, help="an ordinary model: merged, or trained whole")
    commands.choices["score"].add_argument("--max_new_tokens", type=int, default=400)
    commands.choices["score"].add_argument("--batch_size", type=int, default=64)
    commands.choices["grpo"].add_argument("arguments", nargs=argparse.REMAINDER, help="those of examples.grpo")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.command == "data":
        write(options.folder)
    elif options.command == "grpo":
        run_grpo(options.folder, options.arguments)
    else:
        right = score(options.folder, options.model, options.max_new_tokens, options.batch_size)
        print(f"{options.model}: {right:.2%} of the answers are right")


if __name__ == "__main__":
    main()
