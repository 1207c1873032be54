"""Files that are old or new, and never half of either: written beside, then put in the other's place."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files of one folder; all are on the disk, under other names, before the first takes its place.

    Whoever is killed leaves every file as it was or as it was to be. If one cannot be written, as on a full disk, all
    are as they were. Between two of them there is a moment in which one is new and the next still old. What stands at
    a file's place is replaced, also a link: nothing is ever written through it.

    Args:
        contents: new content by path. Later ones are replaced later.

    Raises:
        OSError: if one cannot be written.
    """
    unfinished = {file: file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp") for file in contents}
    try:
        for file, beside in unfinished.items():
            with open(beside, "xb") as out:
                out.write(contents[file])
                out.flush()
                os.fsync(out.fileno())
        for file, beside in unfinished.items():
            os.replace(beside, file)
        for folder in {file.parent for file in contents}:
            _sync(folder)
    finally:
        for beside in unfinished.values():
            beside.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Let the new names outlive a loss of power, where folders can be synchronized."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
