"""Cut the examples' data out of the published data sets: a seeded choice of short sentences and texts.

    git clone https://github.com/UniversalDependencies/UD_English-EWT
    git clone https://github.com/leondz/emerging_entities_17
    git clone https://github.com/PolyAI-LDN/task-specific-datasets
    git clone https://github.com/clinc/oos-eval
    python -m examples.data.cut UD_English-EWT emerging_entities_17 task-specific-datasets/banking_data oos-eval/data

The commits that were used are in README.md beside this file; with them the script writes the committed files again,
byte for byte.
"""

import argparse
import csv
import json
import random
import unicodedata
from pathlib import Path

from peft_mask.recipes.tagging import Sentence, read_columns

HERE = Path(__file__).parent
SEED = 0
SENTENCE_WORDS = 26  # short sentences are quick to train on, and most are no longer
TEXT_WORDS = 16

Row = tuple[str, str]  # text, label


def read_conllu(path: Path) -> list[Sentence]:
    """Read the syntactic words of a CoNLL-U file with their universal part of speech."""
    sentences: list[Sentence] = [[]]
    for line in path.read_text("utf-8").split("\n"):
        number, *columns = line.split("\t")
        if number.isdigit():  # neither a comment, nor a contraction (1-2), nor an elided word (8.1)
            sentences[-1].append((columns[0], columns[2]))
        elif not line and sentences[-1]:
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def cut_sentences(train: list[Sentence], test: list[Sentence], counts: tuple[int, int]) -> dict[str, list[Sentence]]:
    """Choose distinct short sentences; of the test sentences none that is in the published training data."""
    known = {_words(sentence) for sentence in train}
    unseen = [sentence for sentence in test if _words(sentence) not in known]
    return {
        split: _choose(sentences, count)
        for split, sentences, count in zip(("train", "test"), (train, unseen), counts, strict=True)
    }


def _choose(sentences: list[Sentence], count: int) -> list[Sentence]:
    # sorted: the choice is a function of the set of sentences, whatever their order
    distinct = sorted(
        {tuple(s) for s in sentences if len(s) <= SENTENCE_WORDS and all(_is_visible(word) for word, _ in s)}
    )
    return [list(sentence) for sentence in random.Random(SEED).sample(distinct, count)]


def _words(sentence: Sentence) -> tuple[str, ...]:
    return tuple(word for word, _ in sentence)


def _is_visible(word: str) -> bool:
    """Say whether a tokenizer finds anything in a word: a lone variation selector has no word piece."""
    return any(unicodedata.category(character)[0] not in "CMZ" for character in word)


def write_sentences(folder: Path, splits: dict[str, list[Sentence]]) -> None:
    folder.mkdir(exist_ok=True)
    for split, sentences in splits.items():
        blocks = ["".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences]
        (folder / f"{split}.conll").write_text("\n".join(blocks), encoding="utf-8", newline="\n")


def read_banking77(file: Path) -> list[Row]:
    with open(file, encoding="utf-8", newline="") as lines:
        return [(row["text"], row["category"]) for row in csv.DictReader(lines)]


def read_clinc150(file: Path, split: str) -> list[Row]:
    return [(text, label) for text, label in json.loads(file.read_text("utf-8"))[split]]


def cut_texts(rows: list[Row], per_label: int) -> list[Row]:
    """Choose up to `per_label` distinct short texts of every label, in an order that mixes the labels."""
    texts: dict[str, list[str]] = {}
    for text, label in rows:
        text = " ".join(text.split())
        if len(text.split()) <= TEXT_WORDS and text not in texts.setdefault(label, []):
            texts[label].append(text)
    generator = random.Random(SEED)
    chosen = [
        (text, label)
        for label in sorted(texts)
        for text in generator.sample(texts[label], min(per_label, len(texts[label])))
    ]
    generator.shuffle(chosen)
    return chosen


def write_texts(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ud_ewt", type=Path, help="folder of en_ewt-ud-train.conllu and en_ewt-ud-test.conllu")
    parser.add_argument("wnut17", type=Path, help="folder of wnut17train.conll and emerging.test.annotated")
    parser.add_argument("banking77", type=Path, help="folder of train.csv and test.csv")
    parser.add_argument("clinc150", type=Path, help="folder of data_full.json")
    arguments = parser.parse_args()

    train, test = (read_conllu(arguments.ud_ewt / f"en_ewt-ud-{split}.conllu") for split in ("train", "test"))
    write_sentences(HERE / "ud_ewt_pos", cut_sentences(train, test, (3000, 800)))
    train, test = (read_columns(arguments.wnut17 / name) for name in ("wnut17train.conll", "emerging.test.annotated"))
    write_sentences(HERE / "wnut17", cut_sentences(train, test, (2500, 800)))
    for split, per_label in (("train", 8), ("test", 2)):
        rows = cut_texts(read_banking77(arguments.banking77 / f"{split}.csv"), per_label)
        write_texts(HERE / "banking77" / f"{split}.csv", rows)
    for split, per_label in (("train", 4), ("test", 1)):
        rows = cut_texts(read_clinc150(arguments.clinc150 / "data_full.json", split), per_label)
        write_texts(HERE / "clinc150" / f"{split}.csv", rows)


if __name__ == "__main__":
    main()
