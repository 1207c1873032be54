"""`python -m benchmarks`: the benchmarks that need no data and take minutes, in turn.

`python -m benchmarks report` trains and times nothing: it writes the tables and pictures of all trainings at hand.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cards, codec, decoder, grpo, long, memory, rules, step, switch
from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.shares import write_shares
from benchmarks.harness import RESULTS
from benchmarks.zeros import report as zeros

ACCURACY = Path(__file__).parent / "accuracy"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    if parser.parse_args(arguments).command == "report":
        write_reports(ACCURACY, RESULTS)
        return
    for benchmark in (step, memory, cards, switch, codec):
        benchmark.main()


def write_reports(accuracy: Path, results: Path) -> None:
    """Write the pages of all `runs.jsonl` in these folders."""
    for runs in sorted(accuracy.glob("*/runs.jsonl")):
        print(write_report(runs.parent))
    write_shares(accuracy, results)
    decoder.write_pages(results)
    long.write_page_of(results / "long")
    rules.write_page_of(results / "rules")
    zeros.write_page_of(results / "zeros")
    grpo.write_page_of(results / "grpo")


if __name__ == "__main__":
    main()
