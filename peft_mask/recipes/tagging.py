"""Tagging words: reading CoNLL columns, labels on word pieces, and the two scores.

Pure functions without a model, shared by the demo and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_mask.recipes.conll import read_conll

IGNORED = -100  # the label PyTorch's cross entropy leaves out

Sentence = list[tuple[str, str]]  # (word, tag)
Span = tuple[int, int, str]  # first word, word after the last, type


def read_columns(path: Path) -> list[Sentence]:
    """Read the words and tags of a file in CoNLL columns; `conll` says which columns they are.

    Raises:
        ValueError: if a line has more or fewer columns than the others.
    """
    try:
        columns = read_conll(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [list(zip(*sentence, strict=True)) for sentence in zip(columns["tokens"], columns["tags"], strict=True)]


def label_last_pieces(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Put the tag of a word on its last word piece, as in the paper, and `IGNORED` on every other piece.

    Args:
        word_ids: for each piece the number of its word, None for special tokens, as fast tokenizers give them.
        tags: number of the tag of each word.
    """
    following = [*word_ids[1:], None]
    return [
        IGNORED if word is None or word == after else tags[word]
        for word, after in zip(word_ids, following, strict=True)
    ]


def token_accuracy(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Return the fraction of words with the right tag, over all sentences."""
    pairs = [pair for sentence in zip(gold, predicted, strict=True) for pair in zip(*sentence, strict=True)]
    return sum(expected == tag for expected, tag in pairs) / len(pairs)


def spans(tags: Sequence[str]) -> set[Span]:
    """Return the spans that BIO tags mark; an `I-` that continues no span of its type starts one, as in conlleval."""
    found: set[Span] = set()
    start, kind = 0, ""  # of the open span; no kind: none is open
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if kind and (prefix, tag_kind) != ("I", kind):
            found.add((start, position, kind))
            kind = ""
        if tag != "O" and not kind:
            start, kind = position, tag_kind
    return found


def span_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Return the micro-averaged F1 of spans with exactly the right type and boundaries; 0 if there are none."""
    right = total = 0
    for expected_tags, tags in zip(gold, predicted, strict=True):
        expected, found = spans(expected_tags), spans(tags)
        right += len(expected & found)
        total += len(expected) + len(found)
    return 2 * right / total if total else 0.0
