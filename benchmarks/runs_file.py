"""The trainings of a study in one file, `runs.jsonl`: a row each, which is a line of JSON."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from peft_mask.format.atomic import replace_files

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class RunsFile:
    """The rows in `folder`/runs.jsonl; the entries that `key` names tell one training from all others.

    `add` appends, and the row is on the disk when it returns. Of several rows of one training the last counts: with a
    figure that comes later, such as a test score, the row is written anew. A process that is killed leaves at most a
    last line that is cut off. That is no row; a warning says so, and the next `add` takes it away. Several processes
    may add at once. `tidy`, at the end of a study, sorts by key and leaves one row a training.
    """

    folder: Path
    key: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.folder / "runs.jsonl"

    def read(self) -> dict[Key, Row]:
        """The row of each training, by key, in the order of keys; none where there is no file."""
        return self._rows(self.path.read_bytes()) if self.path.exists() else {}

    def add(self, row: Row) -> None:
        """Append a row, or what takes the place of the one with its key.

        Raises:
            ValueError: if an entry of the key is missing.
        """
        self._key_of(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone() as file:
            content = file.read()
            kept = b"".join(line + b"\n" for line in self._lines(content))
            start = min(len(kept), len(content))  # before what was cut off, or where the last newline is missing
            file.truncate(start)
            file.write((kept + _line(row))[start:])
            file.flush()
            os.fsync(file.fileno())

    def tidy(self) -> None:
        """Sort the file by key, one row a training, in one step; a file that is so stays as it is."""
        if not self.path.exists():
            return
        with self._alone() as file:
            content = file.read()
            tidied = b"".join(map(_line, self._rows(content).values()))
            if tidied != content:
                replace_files({self.path: tidied})

    def told(self, key: Key) -> str:
        """How messages name a row: `the row task=trec, seed=0 of 'results/runs.jsonl'`."""
        entries = ", ".join(f"{name}={value}" for name, value in zip(self.key, key, strict=True))
        return f"the row {entries} of '{self.path}'"

    def _rows(self, content: bytes) -> dict[Key, Row]:
        rows = {}
        for number, line in enumerate(self._lines(content), start=1):
            try:
                row = json.loads(line)
                rows[self._key_of(row)] = row
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"'{self.path}', line {number}: expected a JSON object with {', '.join(self.key)}, got "
                    f"{line[:80].decode('utf-8', 'replace')!r} ({error}). Mend or delete that line."
                ) from error
        return dict(sorted(rows.items()))

    def _key_of(self, row: Row) -> Key:
        if missing := [name for name in self.key if name not in row]:
            raise ValueError(f"a training is known by {', '.join(self.key)}, this row has no {', '.join(missing)}")
        return tuple(row[name] for name in self.key)

    def _lines(self, content: bytes) -> list[bytes]:
        """The lines that were written to their end; one that is whole needs no newline."""
        *lines, last = content.split(b"\n")
        if not last:
            return lines
        try:
            json.loads(last)  # a part of an object is no JSON
        except ValueError:
            told = f"'{self.path}', line {len(lines) + 1}, was cut off after {len(last)} bytes"
            warnings.warn(f"{told}; that training counts as not done.", stacklevel=2)
            return lines
        return [*lines, last]

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        """The file while no other process has it; opened again if `tidy` put another in its place meanwhile."""
        while True:
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    file.seek(0)
                    yield file
                    return


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"
