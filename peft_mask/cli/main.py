"""The command line: what was typed -> a command -> what is printed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from huggingface_hub.utils import logging as hub_logging

from peft_mask import __version__
from peft_mask.cli import combine, convert, diff, env, estimate, inspect, merge, report, serve, train, verify
from peft_mask.cli.answer import FAILED, OK, Answer, one_line

COMMANDS = (train, inspect, diff, verify, combine, convert, merge, estimate, report, serve, env)
INTERRUPTED = 130  # what shells give for Ctrl-C

_EXAMPLES = """\
examples:
  peft-mask train task.yaml
  peft-mask inspect runs/trec
  peft-mask verify runs/trec --base sentence-transformers/all-MiniLM-L6-v2
  peft-mask estimate --model meta-llama/Llama-3.2-1B --card 24GB

An ADAPTER is a folder, or an id on the Hub such as user/name or user/name@revision.
exit codes: 0 done, or yes; 1 no (verify) or different (diff); 2 not done, the reason
is one line on stderr; 130 after Ctrl-C. `peft-mask COMMAND --help` says more."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def build() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="peft-mask",
        description="Learn masks, look at them, compare, check, combine, convert, merge and serve them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-mask {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", title="commands")
    for command in COMMANDS:
        command.add(commands)
    for one in commands.choices.values():
        one.formatter_class = argparse.RawDescriptionHelpFormatter
        one.add_argument("--json", action="store_true", help="print JSON, for programs")
        one.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def check_flags(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """End with a line that names the nearest flag of the command, if it has not one that was typed."""
    parsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    if not typed or typed[0] not in parsers:
        return
    own = parsers[typed[0]]
    known = [flag for flag in own._option_string_actions if flag.startswith("--")]
    for word in typed[1 : [*typed, "--"].index("--")]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not any(each.startswith(flag) for each in known):
            near = get_close_matches(flag, known, 1)
            own.error(f"there is no flag {flag}" + (f"; did you mean {near[0]}?" if near else ""))


def read(typed: Sequence[str]) -> argparse.Namespace:
    """Return the options of what was typed; those of `train` are fields, which its task knows."""
    parser = build()
    if typed[:1] != ["train"]:
        check_flags(parser, typed)
        options, left = parser.parse_known_args(typed)
        if left:
            name = f"{parser.prog} {options.command}"
            parser.exit(FAILED, f"{name}: error: {one_line(left[0])} is more than it takes (see {name} --help)\n")
        return options
    asked = [word for word in typed if word in ("-h", "--help")]
    has_task = any(word.partition("=")[0] == "--task" for word in typed)
    if asked and not has_task:
        return parser.parse_args(["train", "--help"])
    own = [word for word in typed[1:] if word in ("--json", "--traceback")]
    options = parser.parse_args(["train", *own])
    train.read(options, [word for word in typed[1:] if word not in (*own, *asked)])
    options.fields = bool(asked)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print what it has found.

    Args:
        arguments: what was typed behind the name of the program; by default what the process was started with.

    Returns:
        The exit code: 0, 1, 2 or 130, as in `peft-mask --help`.

    Raises:
        SystemExit: help was asked for (0), or no command could be made of what was typed (2).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hub_logging.set_verbosity_error()  # or it counts each time that it asks in vain
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if typed[:1] == ["serve"]:
        return serve.serve(typed[1:])
    options = read(typed)
    try:
        with _short_warnings():
            answer: Answer = options.run(options)
        return _print(answer.json() if options.json else answer.text, answer.code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if options.traceback:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
        print(f"peft-mask {options.command}: error: {kind}{one_line(error)}", file=sys.stderr)
        return FAILED


def _print(text: str, code: int) -> int:
    """Print, where a terminal lacks characters with these escaped, and where nobody reads on without a word."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's end complains
    return code


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Let warnings be one line on stderr, and say nothing of what libraries will change some day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda message, *_: print(f"peft-mask: warning: {one_line(message)}", file=sys.stderr)
        yield


__all__ = ["COMMANDS", "INTERRUPTED", "OK", "build", "main"]
