"""The page of the rows at hand: a table for each thing to learn and number of steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import table, together, write_page
from benchmarks.runs_file import Row, RunsFile
from benchmarks.zeros.plan import KEY, RATES, Plan

TITLE = "Where the zeros of a language model belong"
METHODS = ("base", "full", "LoRA", "mask")
NOTE = (
    "SmolLM2-135M-Instruct. Perplexity, mean over the seeds; one standard deviation of a run where there are several. "
    "*exact*: answers that are right to the last token, %. *other text*: perplexity of news, which nothing here is "
    "about; *own answers*: share of the tokens of the base model's answers to sixteen other questions that are still "
    "the most likely ones, %. A mask has no rate to choose; its bytes are those of its file, as are LoRA's in float32."
)
HEADER = ("method", "modules", "off, %", "candidates", "rate", "seeds", "dev", "test", "exact: dev", "test")
HEADER = (*HEADER, "other text", "own answers", "bytes")


def runs_in(folder: Path) -> RunsFile:
    return RunsFile(folder, KEY)


def best_rates(rows: Iterable[Row], data: str, steps: int, seed: int) -> Iterator[Plan]:
    """Yield full fine-tuning and LoRA with another seed, each at the rate that dev chose with seed 0."""
    own = [row for row in rows if (row["data"], row["steps"], row["seed"]) == (data, steps, 0)]
    for method in RATES:
        if tries := [row for row in own if row["method"] == method]:
            best = min(tries, key=lambda row: row["dev"])
            yield Plan(data, method, steps, seed, best["rate"])


def write_page_of(folder: Path) -> None:
    rows = list(runs_in(folder).read().values())
    if not rows:
        return
    parts = [NOTE]
    base = {row["data"]: row for row in rows if row["method"] == "base"}
    settings = sorted({(row["data"], row["steps"]) for row in rows if row["method"] != "base"})
    for data, steps in settings:
        own = [row for row in rows if (row["data"], row["steps"]) == (data, steps)]
        parts.append(
            f"## {data}, {steps} steps\n\n{table(HEADER, [*lines([base[data]] if data in base else []), *lines(own)])}"
        )
    where = together([row["environment"] for row in rows])
    told = f"{where['cpu']}, {where['threads']} threads; torch {where['versions']['torch']}, transformers "
    parts.append(f"{told}{where['versions']['transformers']}, peft {where['versions']['peft']}; {where['date']}.")
    write_page(folder, TITLE, "python -m benchmarks.zeros", "\n\n".join(parts))


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a line for all seeds of one setting."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=_order):
        groups.setdefault(tuple(row[name] for name in KEY if name != "seed"), []).append(row)
    return [_line(group) for group in groups.values()]


def _order(row: Row) -> tuple[object, ...]:
    what = (
        row["modules"],
        row["sparsity"],
        row["among"],
        row["candidates"] != "magnitude",
        row["candidates"],
        row["protected"],
    )
    return (METHODS.index(row["method"]), row["rate"], *what, row["seed"])


def _line(group: Sequence[Row]) -> tuple[str, ...]:
    first = group[0]
    protected = ", super weights kept" if first["protected"] else ""
    among = "" if first["among"] in (0.0, 0.1) else f", {100 * first['among']:g} %"
    has_answers = first["dev_exact"] is not None
    return (
        first["method"],
        first["modules"],
        f"{100 * first['sparsity']:g}" if first["sparsity"] else "",
        first["candidates"] + among + protected,
        f"{first['rate']:g}" if first["rate"] else "",
        f"{len(group)}",
        *(_mean([math.exp(row[split]) for row in group], 2) for split in ("dev", "test")),
        *(_mean([100 * row[f"{split}_exact"] for row in group], 1) if has_answers else "" for split in ("dev", "test")),
        _mean([math.exp(row["other"]) for row in group], 2),
        _mean([100 * row["answers_right"] for row in group], 1),
        f"{round(statistics.mean(row['bytes'] for row in group)):,}" if "bytes" in first else "0",
    )


def _mean(values: Sequence[float], digits: int) -> str:
    told = f"{statistics.mean(values):.{digits}f}"
    return f"{told} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else told
