"""`python -m reproduction --data FOLDER [STUDY ...]`: do the studies without a result, and write the page of all.

`python -m reproduction report` does none: it writes the page and the pictures of the results at hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from benchmarks.accuracy.__main__ import minilm
from benchmarks.accuracy.runs import environment, runs_in
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Setting
from peft_mask.analysis import markdown
from reproduction import (
    controls,
    curve,
    dissimilarity,
    ensembles,
    generalization,
    layers,
    line,
    movement,
    reinitialized,
    representations,
    sparsity,
    storage,
)
from reproduction.models import Models
from reproduction.scale import Scale

RESULTS = Path(__file__).parent / "results"
# A study has TITLE and NOTE, `run(models, scale)` for its result and `draw(result, path)` for its picture.
STUDIES: dict[str, ModuleType] = {
    "storage": storage,
    "representations": representations,
    "dissimilarity": dissimilarity,
    "line": line,
    "controls": controls,
    "ensembles": ensembles,
    "curve": curve,
    "generalization": generalization,
    "reinitialized": reinitialized,
    "movement": movement,
    "sparsity": sparsity,
    "layers": layers,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduction", description=__doc__)
    parser.add_argument(
        "studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; by default all. Or `report` alone"
    )
    parser.add_argument("--data", type=Path, help="folder with one folder a task, as for benchmarks.accuracy")
    parser.add_argument("--model", help="name or folder of an encoder; by default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="do studies that have a result, too")
    parser.add_argument("--steps", type=int, help="of every training, in place of the task's budget")
    parser.add_argument("--recipes", nargs="+", choices=("mask", "paper"), default=list(Scale.recipes))
    parser.add_argument("--rows", type=int, default=Scale.rows, help="training and dev examples looked at")
    parser.add_argument("--points", type=int, default=Scale.points, help="points of a line")
    parser.add_argument("--curve-steps", type=int, default=Scale.curve_steps)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(Scale.seeds),
        help="of each figure, and of the members of an ensemble",
    )
    parser.add_argument("--cycles", type=int, default=Scale.cycles, help="of the rate, for snapshots")
    parser.add_argument("--every", type=int, default=Scale.every, help="steps between snapshots")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(Scale.tasks), metavar="TASK", help="of a sweep"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(Scale.rates), help="to choose from in a sweep")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(Scale.sparsities), help="at the start")
    parser.add_argument("--blocks", type=int, nargs="+", help="how many are masked; by default powers of two, and all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.studies == ["report"]:
        write_report(options.results)
        return
    if unknown := set(options.studies) - STUDIES.keys():
        parser.error(f"there is no study {sorted(unknown)}; there are {list(STUDIES)}")
    chosen = options.studies or list(STUDIES)
    if options.data is None and set(chosen) != {"storage"}:
        parser.error("--data is missing: the folder with the tasks' files")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    setting = Setting(options.data or Path(), options.model or minilm())
    models = Models(setting, options.results / "trainings", options.steps)
    scale = Scale(
        recipes=tuple(options.recipes),
        rows=options.rows,
        points=options.points,
        curve_steps=options.curve_steps,
        seeds=tuple(options.seeds),
        cycles=options.cycles,
        every=options.every,
        tasks=tuple(options.tasks),
        rates=tuple(options.rates),
        sparsities=tuple(options.sparsities),
        blocks=options.blocks and tuple(options.blocks),
    )
    options.results.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        file = options.results / f"{name}.json"
        if file.exists() and not options.again:
            continue
        start = time.perf_counter()
        result = STUDIES[name].run(models, scale)
        seconds = round(time.perf_counter() - start)
        _write(file, {**result, "seconds": seconds, "environment": environment()})
        runs_in(models.folder).tidy()
        STUDIES[name].draw(result, options.results / f"{name}.png")
        print(f"{name}: {seconds} s\n{markdown(result['rows'])}\n", flush=True)
    (options.results / "README.md").write_text(page(options.results), "utf-8")


def write_report(results: Path) -> None:
    """Write the page and the pictures of all results at hand."""
    for name, result in results_in(results).items():
        STUDIES[name].draw(result, results / f"{name}.png")
    (results / "README.md").write_text(page(results), "utf-8")


def results_in(results: Path) -> dict[str, dict[str, Any]]:
    """The result of each study that has one, in the order of the page."""
    files = {name: results / f"{name}.json" for name in STUDIES}
    return {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()}


def page(results: Path) -> str:
    """The tables and pictures of all results at hand."""
    parts = ["# Results of the studies", "Written by `python -m reproduction` from the JSON files beside this page."]
    for name, result in results_in(results).items():
        study = STUDIES[name]
        facts = {key: value for key, value in result.items() if _is_fact(key, value)}
        told = "".join(f"\n- {key}: {value}" for key, value in facts.items())
        parts += [
            f"## {study.TITLE}",
            study.NOTE,
            markdown(result["rows"]),
            told.strip(),
            f"![{study.TITLE}]({name}.png)",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_fact(key: str, value: Any) -> bool:
    return key not in ("rows", "points", "labels", "environment") and value is not None


def _write(file: Path, result: dict[str, Any]) -> None:
    unfinished = file.with_suffix(".tmp")
    text = json.dumps({k: v for k, v in result.items() if k not in ("points", "labels")}, indent=1, allow_nan=False)
    bulk = {key: result[key] for key in ("points", "labels") if key in result}
    if bulk:  # one line each: they are long and for the picture alone
        text = text[:-2] + "".join(f',\n "{key}": {json.dumps(value)}' for key, value in bulk.items()) + "\n}"
    unfinished.write_text(text + "\n", "utf-8")
    unfinished.replace(file)


if __name__ == "__main__":
    main()
