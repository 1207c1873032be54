"""Fields of a training: a YAML file, and flags of the same names over it -> dataclasses."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser

OF_OTHER_METHODS = ("--r", "--rank", "--lora_r", "--lora_alpha", "--lora_dropout")
SECRETS = ("hub_token", "push_to_hub_token")


class FieldParser(HfArgumentParser):
    """A parser of dataclasses that raises ValueError, and takes names for what they are alone."""

    def __init__(self, kinds: Sequence[type], **settings: Any) -> None:
        super().__init__(kinds, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the fields that words name, by name, with their values as they are typed."""
        namespace, _ = self.parse_known_args(list(words), Namespace())
        options = self._option_string_actions
        names = [options[name].dest for name in map(_name, words) if name in options]
        return {name: getattr(namespace, name) for name in dict.fromkeys(names)}

    def takes(self, flag: str) -> str:
        """Return how many values a flag takes: "one", "many", or that it "may" have one, as what is on or off."""
        action = self._option_string_actions.get(flag)
        return {"?": "may", "+": "many", "*": "many"}.get(str(action.nargs) if action else "", "one")

    def check_used(self, words: Sequence[str]) -> None:
        """Raise ValueError if a word belongs to no field."""
        _, left = self.parse_known_args(list(words), Namespace())
        if left:
            raise ValueError(f"{left[0]!r} belongs to no field: give one file at most, then --field value.")

    def check_names(self, words: Sequence[str], source: str) -> None:
        """Raise ValueError if a word is an option that no field has.

        Args:
            words: of a command line.
            source: where they come from, which the error begins with.
        """
        for name in map(_name, words):
            if name.startswith("--") and name not in self._option_string_actions:
                if name in OF_OTHER_METHODS:
                    raise ValueError(
                        f"{source}there is no field {name[2:]!r}, for a mask has no rank: its size is target_sparsity, "
                        "the share of the weights that is off (0.005 by default), or target_bytes."
                    )
                known = [option[2:] for option in self._option_string_actions if "-" not in option[2:]]
                near = get_close_matches(name[2:].replace("-", "_"), known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"{source}there is no field {name[2:]!r}{meant} --help with a task lists all.")


def read_yaml(file: str) -> dict[str, Any]:
    """Read the fields of a YAML file.

    Values are what is written, as texts: a field knows its type, where YAML takes `1e-3` for a text, `2:4` for 124 and
    `no` for False. Lists hold such texts; what is nested deeper is as YAML has it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no YAML, or something else than fields with values.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{file}: this is a folder; name the file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{file}: there is no such file (working directory {Path.cwd()}).")
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(path.read_text("utf-8-sig"), yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode) or not all(isinstance(key.value, str) for key, _ in root.value):
            raise ValueError(f"{file}: expected a field and its value in each line, such as 'max_steps: 100'.")
        for key, value in root.value:
            name, line = key.value, key.start_mark.line + 1
            if name in lines:  # YAML itself would take the last
                raise ValueError(f"{file}: {name!r} stands in line {lines[name]} and in line {line}; keep one of them.")
            lines[name], found[name] = line, _written(value)
    except UnicodeDecodeError:
        raise ValueError(f"{file}: this is no text in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the file"
        raise ValueError(f"{file}: {where} is not YAML ({getattr(error, 'problem', None) or error}).") from None
    return found


def _written(node: Any) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_written(each) for each in node.value]
    return yaml.safe_load(yaml.serialize(node))


def words_of(fields: Mapping[str, Any]) -> list[str]:
    """Return fields as the words of a command line; those that are None are left out.

    >>> words_of({"max_steps": 3, "bf16": True, "text_column": ["a", "b"], "seed": None})
    ['--max_steps=3', '--bf16=true', '--text_column', 'a', 'b']
    """
    words: list[str] = []
    for name, value in fields.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, bool):
            words.append(f"--{name}={str(value).lower()}")
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def command_of(fields: Mapping[str, Any]) -> str:
    """Return the command that trains with these fields, without secrets."""
    return shlex.join(["peft-mask", "train", *words_of(without_secrets(fields))])


def without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that may be shown."""
    return {name: value for name, value in fields.items() if name not in SECRETS}


def write_yaml(fields: Mapping[str, Any], file: Path) -> None:
    """Write fields, without secrets, so that `read_yaml` gives them again."""
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    file.write_text(yaml.safe_dump(without_secrets(kept), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _name(word: str) -> str:
    return word.partition("=")[0]
