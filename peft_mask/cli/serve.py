"""`peft-mask serve`: a folder of adapters over HTTP."""

from __future__ import annotations

import sys
from typing import Any

from peft_mask.cli.answer import FAILED, OK, one_line


def add(commands: Any) -> None:
    """Add the command to a parser; its arguments are the server's, and `serve` has them."""
    commands.add_parser("serve", help="answer over HTTP for a folder of adapters", add_help=False)


def serve(arguments: list[str]) -> int:
    """Serve until Ctrl-C, with the arguments of `python -m peft_mask.server`.

    Returns:
        The exit code.
    """
    from peft_mask.server.__main__ import main as serve_until_interrupted

    try:
        serve_until_interrupted(arguments)
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code if end.code is not None else OK
        print(f"peft-mask serve: {one_line(end.code)}", file=sys.stderr)
        return FAILED
    return OK
