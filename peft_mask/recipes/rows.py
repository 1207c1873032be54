"""What the rows of a data set must hold, the names of their labels, and rows that are held out; errors name the row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets

SMALLEST = 10  # rows of which a tenth can be held out


def source_of(rows: Dataset) -> str:
    """Return what an error calls the rows: the option and the file, or the split of a data set of the Hub."""
    return rows.info.description or "the data"


def is_file(rows: Dataset) -> bool:
    """Whether the rows were read from a file that the command line names."""
    return source_of(rows).startswith("--")


def check_columns(rows: Dataset, wanted: Sequence[str]) -> None:
    """Raise ValueError if a wanted column is not among those of the rows."""
    if unknown := [name for name in wanted if name not in rows.column_names]:
        raise ValueError(f"{source_of(rows)}: there is no column {unknown}; the data have {rows.column_names}.")


def choose_column(rows: Dataset, given: str | None, usual: Sequence[str], option: str) -> str:
    """Return a given column, else the first with a usual name.

    Raises:
        ValueError: if the given column does not exist, or none has a usual name.
    """
    if given is not None:
        check_columns(rows, [given])
        return given
    found = next((name for name in usual if name in rows.column_names), None)
    if found is None:
        raise ValueError(
            f"{source_of(rows)}: name the column with --{option}; the data have {rows.column_names} (of a table, its "
            f"first line), of which none is called {' or '.join(usual)}."
        )
    return found


def check_filled(rows: Dataset, columns: Sequence[str]) -> None:
    """Raise ValueError if a column is missing, or empty in a row."""
    check_columns(rows, columns)
    for column in columns:
        for number, value in enumerate(rows[column][:], 1):
            if value is None:
                raise ValueError(
                    f"{source_of(rows)}: row {number}: column {column!r} is empty; fill it in or leave the row out."
                )


def check_texts(rows: Dataset, columns: Sequence[str]) -> None:
    """Raise ValueError if a column is missing, empty in a row, or holds something else than texts."""
    check_filled(rows, columns)
    for column in columns:
        if (kind := type_of(rows, column)) not in ("string", "large_string"):
            raise ValueError(f"{source_of(rows)}: column {column!r} holds {kind}; expected texts.")


def check_words(rows: Dataset, words: str, tags: str) -> None:
    """Raise ValueError if a row has not a list of words and, of the same length, one of tags."""
    check_filled(rows, [words, tags])
    for column in (words, tags):
        if type_of(rows, column) != "lists":
            raise ValueError(
                f"{source_of(rows)}: column {column!r} holds {type_of(rows, column)}; expected a list in each row, of "
                "words or of their tags."
            )
    for number, (some_words, some_tags) in enumerate(zip(rows[words][:], rows[tags][:], strict=True), 1):
        where = f"{source_of(rows)}: row {number}:"
        if len(some_words) != len(some_tags):
            raise ValueError(
                f"{where} expected a tag for each word, found {len(some_words)} words and {len(some_tags)} tags."
            )
        if (
            None in some_tags
            or "" in some_tags
            or not all(isinstance(word, str) and (word.strip(" ") or not is_file(rows)) for word in some_words)
        ):
            raise ValueError(f"{where} a word or a tag is empty or no text in {some_words!r:.60}, {some_tags!r:.60}.")


def type_of(rows: Dataset, column: str) -> str:
    """Return what a column holds, in words for an error: "lists", "objects" or the type of Arrow."""
    feature = rows.features[column]
    if isinstance(feature, dict):
        return "objects"
    return "lists" if hasattr(feature, "feature") else getattr(feature, "dtype", "objects")


def label_texts(rows: Dataset, column: str) -> list[Any]:
    """Return the label of each row as text, or the list of its labels; a number of a `ClassLabel` becomes its name.

    Raises:
        ValueError: if such a number is out of range.
    """
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)

    def text_of(value: Any, row: int) -> Any:
        if isinstance(value, list):
            return [text_of(one, row) for one in value]
        if not isinstance(inner, ClassLabel):
            return str(value).strip()
        if not 0 <= value < len(inner.names):
            raise ValueError(
                f"{source_of(rows)}: row {row}: column {column!r} holds {value}, the number of no class; leave rows "
                "without a label out."
            )
        return inner.names[value]

    return [text_of(value, row) for row, value in enumerate(rows[column][:], 1)]


def label_names(rows: Dataset, column: str) -> list[str]:
    """Return the names of the labels in the order of their numbers; the column holds one a row, or lists of them.

    Raises:
        ValueError: if a label is missing, all are the same, or they are no classes but objects or fractions.
    """
    check_filled(rows, [column])
    where = f"{source_of(rows)}: column {column!r}"
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)
    kind = getattr(inner, "dtype", "objects")
    if hasattr(inner, "feature") or not kind.startswith(("string", "large_string", "int", "uint", "bool", "float")):
        raise ValueError(f"{where} holds {kind}; classification needs classes: texts or whole numbers.")
    texts = label_texts(rows, column)
    found = {text for row in texts for text in row} if hasattr(feature, "feature") else set(texts)
    if kind.startswith("float") or (fractions := _fractions(found)):
        example = min(found) if kind.startswith("float") else fractions[0]
        raise ValueError(
            f"{where} holds numbers such as {example}, as for regression, which is not supported; write classes as "
            "names or whole numbers."
        )
    if len(found) < 2:
        raise ValueError(
            f"{where} holds {min(found, default=None)!r} alone; classification needs two classes or more, as anything "
            "is right about one."
        )
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    return sorted(found, key=lambda text: (int(text), text)) if all(map(_is_whole, found)) else sorted(found)


def label_numbers(rows: Dataset, column: str, names: Sequence[str]) -> list[Any]:
    """Return the numbers of the labels of each row, which are their places in `names`.

    Raises:
        ValueError: if a label is missing, or does not occur in the training data.
    """
    check_filled(rows, [column])
    numbers = {name: number for number, name in enumerate(names)}

    def number_of(value: Any, row: int) -> Any:
        if isinstance(value, list):
            return [number_of(one, row) for one in value]
        if value not in numbers:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(
                f"{source_of(rows)}: row {row}: label {value!r} does not occur in the training data, only {known}."
            )
        return numbers[value]

    return [number_of(value, row) for row, value in enumerate(label_texts(rows, column), 1)]


def hold_out(rows: Dataset, label_column: str, seed: int) -> dict[str, Dataset]:
    """Split a tenth off as "test", of each label as large a share as of the others, if a row has one label.

    A label with a single row stays in "train"; the test has as many rows as there are other labels, if a tenth is less.

    Raises:
        ValueError: if there are less than ten rows.
    """
    if len(rows) < SMALLEST:
        raise ValueError(
            f"{source_of(rows)}: {len(rows)} rows are too few to hold a tenth out for the test; expected {SMALLEST} or "
            "more, or a --test_file."
        )
    labels = rows[label_column][:]
    if isinstance(labels[0], list | dict):  # many labels a row, or answers
        return dict(rows.train_test_split(test_size=0.1, seed=seed))
    counts = Counter(labels)
    single = [row for row, label in enumerate(labels) if counts[label] == 1]
    if single:
        names = [str(labels[row]) for row in single]
        print(f"labels whose only row stays in training: {', '.join(names[:10])} ({len(names)} in all).")
    others = [row for row, label in enumerate(labels) if counts[label] > 1]
    several = [label for label, count in counts.items() if count > 1]
    if not several:
        raise ValueError(
            f"{source_of(rows)}: column {label_column!r}: every label has one row, so that none can be both learned "
            "and tested; is it the column of the labels?"
        )
    size = max(len(several), min(math.ceil(len(rows) / 10), len(others) // 2))
    places = {label: place for place, label in enumerate(several)}
    stratum = np.array([places[labels[row]] for row in others])
    chosen = rows.select(others).add_column("stratum", stratum, feature=ClassLabel(len(several)))
    parts = chosen.train_test_split(test_size=size, stratify_by_column="stratum", seed=seed)
    parts = parts.remove_columns("stratum")
    return {"train": concatenate_datasets([parts["train"], rows.select(single)]), "test": parts["test"]}


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _fractions(texts: set[str]) -> list[str]:
    """Return the numbers that are not whole, if all texts are numbers."""
    try:
        numbers = {text: float(text) for text in texts}
    except ValueError:
        return []
    return sorted(text for text, number in numbers.items() if not _is_whole(text) and math.isfinite(number))
