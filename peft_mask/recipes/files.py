"""Reading files of rows, a function a type; every error names the file and, where there is one, the line or the row.

The readers are Python's own `csv` and `json`, as they know the line they are in; Parquet is read by Arrow.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, Value
from pyarrow import parquet

from peft_mask.recipes.conll import read_conll

FILE_TYPES = {
    ".csv": "table",
    ".tsv": "table",
    ".json": "json",
    ".jsonl": "json lines",
    ".parquet": "parquet",
    ".conll": "columns",
    ".conllu": "columns",
}
SEPARATORS = ",;\t|"

Record = tuple[int, list[str]]  # the line it starts in, and its cells


def load_file(option: str, name: str, types: Mapping[str, str] = FILE_TYPES) -> Dataset:
    """Load a file of rows; its name may have `.gz` behind the ending.

    Of a table every column holds texts, or None for an empty cell. A file in CoNLL columns has `tokens` and `tags`.

    Args:
        option: of the command line, which an error names.
        name: the file.
        types: endings of files, and the names of their readers.

    Returns:
        The rows; `info.description` is the option and the name, for errors that are found later.

    Raises:
        ValueError: if the type of the file is unknown, or it is empty or damaged.
        FileNotFoundError: if it does not exist.
    """
    path, source = Path(name), f"--{option} {name}"
    reader = types.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if path.is_dir():
        raise ValueError(f"{source}: expected a file, found a folder; name a file in it.")
    if reader is None:
        raise ValueError(
            f"{source}: expected a file that ends in one of {', '.join(types)}, or in such an end and .gz."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file (working directory {Path.cwd()}).")
    try:
        rows = READERS[reader](path.read_bytes())
        if len(rows) == 0:
            raise ValueError("there are no rows, only a header or nothing.")
    except OSError as error:
        raise ValueError(f"{source}: the file cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    rows.info.description = source
    if reader == "columns" and len(names := rows.column_names) > 2:
        tag = "upos" if "upos" in names else names[-1]
        print(f"{source}: the tags are column {tag}; --label_column chooses another of {', '.join(names[2:])}.")
    return rows


def unpacked(data: bytes) -> bytes:
    """Unpack gzip.

    Raises:
        ValueError: if the data are damaged, or there are none.
    """
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise ValueError("the file is damaged: it begins as gzip and does not go on so.") from None
    if not data.strip():
        raise ValueError("the file is empty; expected rows.")
    return data


def text_of(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark; lines end in a line feed.

    Raises:
        ValueError: if the bytes are something else.
    """
    data = unpacked(data)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("the file is UTF-16; save it as UTF-8.")
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("the file is a zip archive, as those of Excel are; unpack it, or save it as CSV in UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8, for example with "
            "`iconv -f LATIN1 -t UTF-8` if it is Latin-1."
        ) from None
    if "\0" in text:
        raise ValueError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a zero byte; expected text.")
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")


def records(text: str, separator: str, quoting: Literal[0, 3]) -> list[Record]:
    """Return the rows of a table that hold something, the header first.

    Raises:
        ValueError: if quotes do not match, or a row has more or fewer cells than the header.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    found, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error:
        raise ValueError(
            f"line {line}: a quoted cell has no end, or is not followed by {separator!r}; write a quote within a "
            "quoted cell twice."
        ) from None
    expected = len(found[0][1])
    for line, cells in found:
        if len(cells) != expected:
            raise ValueError(
                f"line {line}: expected {expected} cells separated by {separator!r}, as in the header, found "
                f"{len(cells)}; put a text that holds {separator!r} in quotes."
            )
    return found


def tab_records(text: str) -> list[Record]:
    r"""Return the rows of a table with tabs, whose writer may know quotes or may not.

    A quoted cell with a tab or a line end in it is more likely two lone quotes, if the rows fit without quotes too.

    Raises:
        ValueError: as `records`.
    """
    try:
        quoted = records(text, "\t", csv.QUOTE_MINIMAL)
    except ValueError:
        return records(text, "\t", csv.QUOTE_NONE)
    if any("\t" in cell or "\n" in cell for _, cells in quoted for cell in cells):
        try:
            return records(text, "\t", csv.QUOTE_NONE)
        except ValueError:
            pass
    return quoted


def read_table(data: bytes) -> Dataset:
    """Read a table with a header, whose separator is the one of `SEPARATORS` that makes most columns of the header."""
    text = text_of(data)
    header = next(line for line in text.split("\n") if line.strip())
    separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
    rows = tab_records(text) if separator == "\t" else records(text, separator, csv.QUOTE_MINIMAL)
    names = [name.strip() or f"column_{number}" for number, name in enumerate(rows[0][1], 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the header has more than one column {twice}; rename all but one.")
    cells = zip(*(row for _, row in rows[1:]), strict=True) if rows[1:] else [()] * len(names)
    columns = {
        name: [cell if cell.strip() else None for cell in column] for name, column in zip(names, cells, strict=True)
    }
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in names}))


def read_json(data: bytes) -> Dataset:
    """Read a list of objects, such a list as the "data" of an object, an object of lists, or an object a line."""
    text = text_of(data)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_json_lines(data)
        raise ValueError(f"line {error.lineno} is not JSON ({error.msg}).") from None
    if isinstance(content, dict):
        if isinstance(content.get("data"), list):
            content = content["data"]
        elif content and all(isinstance(values, list) for values in content.values()):
            return from_columns(content)
        elif content and all(_is_numbered(values) for values in content.values()):
            return from_columns({name: list(values.values()) for name, values in content.items()})
        else:
            content = [content]
    if not isinstance(content, list):
        raise ValueError(f"expected a list of objects, an object of lists or an object a line, found {content!r:.60}.")
    return from_objects(dict(enumerate(content, 1)), "row")


def read_json_lines(data: bytes) -> Dataset:
    """Read an object a line."""
    found = {}
    for number, line in enumerate(text_of(data).split("\n"), 1):
        if line.strip():
            try:
                found[number] = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg}); expected an object a line.") from None
    return from_objects(found, "line")


def _is_numbered(values: Any) -> bool:
    """Whether they are a column as pandas' `to_json` writes it: {"0": ..., "1": ...}."""
    return isinstance(values, dict) and all(key.isdecimal() for key in values)


def from_objects(objects: Mapping[int, Any], place: str) -> Dataset:
    """Make a data set of objects by their places; a name that some of them lack is None there."""
    for number, row in objects.items():
        if not isinstance(row, dict):
            raise ValueError(f"{place} {number}: expected an object with the names of the columns, found {row!r:.60}.")
    names = dict.fromkeys(name for row in objects.values() for name in row)
    return from_columns({name: [row.get(name) for row in objects.values()] for name in names})


def from_columns(columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """Make a data set of columns.

    Raises:
        ValueError: if they have different lengths, or one holds values of different types.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns have different numbers of rows: {lengths}.")
    for name, values in columns.items():
        kinds: dict[type, int] = {}
        for row, value in enumerate(values, 1):
            if value is not None:
                kinds.setdefault(type(value), row)
        if len(kinds) > 1 and set(kinds) != {int, float}:
            first, second = sorted(kinds.values())[:2]
            raise ValueError(
                f"row {second}: column {name!r} holds {values[second - 1]!r:.60}, and in row {first} "
                f"{values[first - 1]!r:.60}; give all the same type."
            )
    try:
        return Dataset.from_dict(dict(columns))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"the rows do not make a table ({str(error).splitlines()[0]}).") from None


def read_parquet(data: bytes) -> Dataset:
    """Read a Parquet file; the features that `datasets` wrote into it are kept."""
    if not data:
        raise ValueError("the file is empty; expected rows.")
    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the file is not Parquet ({str(error).splitlines()[0]}).") from None
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
    return Dataset(table)


def read_lines(data: bytes) -> Dataset:
    """Read a text a line; blank lines are left out."""
    return Dataset.from_dict({"text": [line for line in text_of(data).split("\n") if line.strip()]})


def read_columns(data: bytes) -> Dataset:
    """Read CoNLL columns."""
    return Dataset.from_dict(read_conll(text_of(data)))


READERS = {
    "table": read_table,
    "json": read_json,
    "json lines": read_json_lines,
    "parquet": read_parquet,
    "columns": read_columns,
    "text": read_lines,
}
