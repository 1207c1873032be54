"""Where adapters come from: the name of one -> its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft_mask.serving.errors import AdapterRefusedError, UnknownAdapterError

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Callable[[str], str | os.PathLike[str]]
FILES = CONFIG, TENSORS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def check_name(name: object) -> str:
    """Return a name that can be a part of a path and of a message.

    Raises:
        TypeError: it is no string.
        UnknownAdapterError: it has other characters than letters, digits and `._-`, more than 128, or begins with one
            of these three.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an adapter is a string, got {name!r}.")
    if not _NAME.fullmatch(name):
        raise UnknownAdapterError(
            name if len(name) <= 128 else f"{name[:125]}...",
            "names are of up to 128 letters, digits, '.', '_' and '-', and begin with a letter or a digit.",
        )
    return name


def locator(source: Source) -> Callable[[str], Path]:
    """Return what finds the folder of an adapter whose name was checked.

    Args:
        source: a folder of adapters' folders; a mapping from name to folder, or to an id on the Hub with its
            `@revision` or without; or what returns one of these for a name, and raises a `LookupError` for none.

    Raises:
        ValueError: the folder does not exist.
        TypeError: it is none of the three.
    """
    if isinstance(source, (str, os.PathLike)):
        root = Path(source)
        if not root.is_dir():
            raise ValueError(f"there is no folder '{root}' to take adapters from.")
        return lambda name: _inside(root, name)
    if isinstance(source, Mapping):
        return lambda name: _of_mapping(source, name)
    if callable(source):
        return lambda name: _of_call(source, name)
    raise TypeError(f"source must be a folder, a mapping or a callable, got a {type(source).__name__}.")


def without_place(message: str, source: Source) -> str:
    """Return a message for strangers: of a source that is a folder it does not say where that is."""
    if not isinstance(source, (str, os.PathLike)):
        return message
    root = f"'{Path(source)}"
    return message.replace(f"{root}/", "'").replace(f"{root}'", "the source")


def names_of(source: Source) -> list[str]:
    """Return the names that a source has now, sorted: of a folder those that could be an adapter's.

    Raises:
        TypeError: the source is a callable, which does not tell.
    """
    if isinstance(source, (str, os.PathLike)):
        names = (path.parent.name for path in Path(source).glob(f"*/{CONFIG}"))
        return sorted(name for name in names if _NAME.fullmatch(name))
    if isinstance(source, Mapping):
        return sorted(source)
    raise TypeError("a source that is a callable does not tell which names it knows.")


def _inside(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise UnknownAdapterError(name, f"'{root}' has no folder of that name.")
    return folder


def _of_mapping(source: Mapping[str, str | os.PathLike[str]], name: str) -> Path:
    try:
        place = source[name]
    except LookupError:
        raise UnknownAdapterError(name, f"the source names {len(source)} adapters, and not this one.") from None
    return fetched(name, place)


def _of_call(source: Callable[[str], str | os.PathLike[str]], name: str) -> Path:
    try:
        place = source(name)
    except AdapterRefusedError:
        raise
    except LookupError as error:
        raise UnknownAdapterError(name, f"the source does not know it ({error!r}).") from error
    return fetched(name, place)


def is_hub_id(place: str) -> bool:
    """Whether a text can be an id on the Hub, with its `@revision` or without."""
    return _HUB.fullmatch(place) is not None


def fetched(name: str, place: str | os.PathLike[str], files: Sequence[str] = FILES) -> Path:
    """Return the folder of an adapter, downloaded if its place is an id on the Hub.

    Args:
        name: of the adapter, for messages.
        place: a folder, or an id on the Hub with its `@revision` or without.
        files: names or patterns of what is downloaded.

    Raises:
        AdapterRefusedError: it is neither a folder nor such an id, or cannot be downloaded.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder
    found = _HUB.fullmatch(str(place))
    if found is None:
        raise AdapterRefusedError(name, f"'{place}' is no folder, nor an id on the Hub like 'user/name@revision'.")
    from huggingface_hub import snapshot_download  # only where it is needed

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=list(files)))
    except Exception as error:
        raise AdapterRefusedError(name, f"'{place}' cannot be downloaded ({error}).") from error
