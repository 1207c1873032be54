"""Cut the examples' data out of the published data sets: a seeded choice of short rows, as many for every label.

    git clone https://github.com/PolyAI-LDN/task-specific-datasets
    git clone https://github.com/clinc/oos-eval
    python examples/data/cut.py task-specific-datasets/banking_data oos-eval/data

The commits that were used are in README.md beside this file; with them the script writes the committed files again,
byte for byte.
"""

import argparse
import csv
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
MAX_WORDS = 16  # short texts are quick to train on, and few rows are longer
SEED = 0

Row = tuple[str, str]  # text, label


def banking77(folder: Path, split: str) -> list[Row]:
    with open(folder / f"{split}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def clinc150(folder: Path, split: str) -> list[Row]:
    rows = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))[split]
    return [(text, label) for text, label in rows]


def cut(rows: list[Row], per_label: int) -> list[Row]:
    """Choose up to `per_label` distinct short texts of every label, in an order that mixes the labels."""
    texts: dict[str, list[str]] = {}
    for text, label in rows:
        text = " ".join(text.split())
        if len(text.split()) <= MAX_WORDS and text not in texts.setdefault(label, []):
            texts[label].append(text)
    generator = random.Random(SEED)
    chosen = [
        (text, label)
        for label in sorted(texts)
        for text in generator.sample(texts[label], min(per_label, len(texts[label])))
    ]
    generator.shuffle(chosen)
    return chosen


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path, help="folder of train.csv and test.csv")
    parser.add_argument("clinc150", type=Path, help="folder of data_full.json")
    arguments = parser.parse_args()
    for split, per_label in (("train", 50), ("test", 20)):
        write(HERE / "banking77" / f"{split}.csv", cut(banking77(arguments.banking77, split), per_label))
    for split, per_label in (("train", 25), ("test", 10)):
        write(HERE / "clinc150" / f"{split}.csv", cut(clinc150(arguments.clinc150, split), per_label))


if __name__ == "__main__":
    main()
