"""Reading CoNLL files: a word a line, its columns separated by white space, a blank line between sentences.

Which lines and columns are taken:

- Columns are separated by spaces or tabs; at tabs alone where words hold spaces. Each line has equally many.
- The tag is the last column, of CoNLL-U's ten the fourth (UPOS). The word is the first column, the second where the
  first numbers the words.
- `-DOCSTART-` lines end a sentence. Comments (`# text = ...`), and CoNLL-U's ranges (`1-2`) and empty nodes (`1.1`),
  are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_COMMENT = re.compile(r"# |#\w+\s*=")
_NUMBER = re.compile(r"\d+([-.]\d+)?")

Cells = list[str]  # the columns of one line
Split = Callable[[str], Cells]


def at_white_space(line: str) -> Cells:
    """Split at spaces and tabs; other characters that Python counts as white space are part of a word."""
    return re.split(r"[ \t]+", line.strip(" \t"))


def at_tabs(line: str) -> Cells:
    """Return the cells of a line that are separated by tabs."""
    return [cell.strip(" ") for cell in line.split("\t")]


def layout(lines: Iterable[str]) -> tuple[Split, int]:
    """Return what separates the columns of most lines, and how many columns those have."""
    lines = list(lines)
    by_space = Counter(len(at_white_space(line)) for line in lines)
    # a tab at the end of some lines: their tag is missing, and the rest of a word with a space is not it
    complete = len({line.endswith("\t") for line in lines}) == 1
    if (len(by_space) > 1 or not complete) and 2 * sum("\t" in line for line in lines) > len(lines):
        return at_tabs, Counter(len(at_tabs(line)) for line in lines).most_common(1)[0][0]
    return at_white_space, by_space.most_common(1)[0][0]


def sentences_of(text: str) -> list[list[Cells]]:
    """Return the columns of each word of each sentence.

    Raises:
        ValueError: if a line has more or fewer columns than most, or no word or tag, or there are no words.
    """
    # Not splitlines(): a token may hold a character that Python takes for a line end.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if text.startswith("#begin document"):
        raise ValueError(
            "this is CoNLL-2012, where the word is the fourth column; keep the columns of word and tag alone."
        )
    filled = [line for line in lines if line.strip() and not _ends_sentence(line)]
    plain = [line for line in filled if not line.startswith("#")] or filled
    if not plain:
        raise ValueError("there are no words; expected a word and its tag in each line.")
    split, width = layout(plain)
    if width == 1:
        raise ValueError("the lines have one column; expected a word and its tag, separated by white space.")
    tags = {split(line)[-1] for line in plain}
    sentences: list[list[Cells]] = [[]]
    for number, line in enumerate(lines, 1):
        cells = split(line)
        if _ends_sentence(line):
            sentences.append([])
        elif _COMMENT.match(line) and not (len(cells) == width and cells[-1] in tags):
            continue
        elif len(cells) != width:
            raise ValueError(
                f"line {number} is {line!r:.80}: expected {width} columns, as in most lines, found {len(cells)}."
            )
        elif not cells[0] or not cells[-1]:
            raise ValueError(f"line {number} is {line!r:.80}: the {'tag' if cells[0] else 'word'} is missing.")
        else:
            sentences[-1].append(cells)
    return [sentence for sentence in sentences if sentence]


def read_conll(text: str) -> dict[str, list[list[str]]]:
    """Return the columns of a file by name, of each a list a sentence.

    They are "tokens" and "tags" and, of more than two, each column once more by its name in CoNLL-U or its number,
    counted from 1.

    Raises:
        ValueError: as in `sentences_of`.
    """
    sentences = sentences_of(text)
    width = len(sentences[0][0])
    words = [[cells for cells in sentence if cells[0].isdecimal()] for sentence in sentences]
    numbered = width > 2 and all(_NUMBER.fullmatch(cells[0]) for sentence in sentences for cells in sentence)
    if numbered and all([cells[0] for cells in s] == [str(i + 1) for i in range(len(s))] for s in words):
        sentences, word = [sentence for sentence in words if sentence], 1
    else:
        word = 0
    is_conllu = word == 1 and width == len(CONLLU)
    tag = CONLLU.index("upos") if is_conllu else width - 1
    names = CONLLU if is_conllu else tuple(str(number) for number in range(1, width + 1))
    wanted = {"tokens": word, "tags": tag} | ({name: i for i, name in enumerate(names)} if width > 2 else {})
    return {name: [[cells[i] for cells in sentence] for sentence in sentences] for name, i in wanted.items()}


def _ends_sentence(line: str) -> bool:
    return not line.strip() or line.split(maxsplit=1)[0] == "-DOCSTART-"
