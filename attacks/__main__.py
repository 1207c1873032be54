"""`python -m attacks`: every hostile adapter by every door; `python -m attacks fuzz --files 100000 --seed 0`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # no folder is to be looked for on the Hub because it is broken

import torch
from transformers.utils.logging import disable_progress_bar

from attacks import cases, damage, fuzz, kill, resume, run


def main() -> int:
    """Run what the command line asks for; 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("table", help="the table of hostile adapters (the default)")
    commands.add_parser("fields", help="every field of the configuration with every hostile value")
    fuzzing = commands.add_parser("fuzz", help="mutants of good records and files")
    fuzzing.add_argument("--files", type=int, default=100_000, help="how many")
    fuzzing.add_argument("--seed", type=int, default=0, help="which ones")
    fuzzing.add_argument("--start", type=int, default=0, help="number of the first, to repeat one")
    damaging = commands.add_parser("damage", help="good adapters with trained heads, damaged")
    damaging.add_argument("--files", type=int, default=10_000, help="how many")
    damaging.add_argument("--seed", type=int, default=0, help="which ones")
    damaging.add_argument("--start", type=int, default=0, help="number of the first, to repeat one")
    killing = commands.add_parser("kill", help="kill processes that save")
    killing.add_argument("--kills", type=int, default=200, help="how many, of each kind")
    killing.add_argument("--seed", type=int, default=0, help="of the moments")
    resuming = commands.add_parser("resume", help="kill processes that train, and resume them")
    resuming.add_argument("--kills", type=int, default=20, help="how many, of each kind")
    resuming.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    if arguments.command == "fuzz":
        return 0 if fuzz.report(arguments.files, arguments.seed, arguments.start) else 1
    if arguments.command == "damage":
        return 0 if damage.report(arguments.files, arguments.seed, arguments.start) else 1
    if arguments.command == "kill":
        return 0 if kill.report(arguments.kills, arguments.seed) else 1
    if arguments.command == "resume":
        return 0 if resume.report(arguments.kills, arguments.seed) else 1
    chosen = cases.hostile_fields() if arguments.command == "fields" else cases.cases()
    return 0 if run.report(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
