"""Where commands write: a new folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_mask.cli.adapter import COMPANIONS

_STATE = "trainer_state.json"  # curves of the training of other masks


@contextmanager
def new_folder(place: str) -> Iterator[Path]:
    """Give a folder to write into, which becomes the one that was asked for at the end, and is gone after an error.

    Args:
        place: the folder; it must not exist, or be empty.

    Raises:
        ValueError: there is something at that place already.
    """
    target = Path(place)
    check_free(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made.chmod(0o777 & ~_umask())
        yield made
        if target.is_dir():
            target.rmdir()  # it is empty
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def check_free(place: str) -> None:
    """Refuse a place where something is, before any work is done.

    Raises:
        ValueError: it is a file, or a folder that is not empty.
    """
    target = Path(place)
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"'{place}' exists already: name a new folder with --out, or remove that one.")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside an adapter's two files and goes with its head and tokens: labels, card, tokenizer."""
    for name in COMPANIONS:
        if name != _STATE and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
