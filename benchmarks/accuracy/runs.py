"""The search: which runs there are, each a row of a file, so that the whole can be stopped and taken up again."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import probe, training
from benchmarks.accuracy.probe import Probe
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import Method, Setting
from benchmarks.runs_file import Key, RunsFile

SEARCH_SEED = 0
MOST = 7  # rates that are tried of a method whose best is at the edge of its own
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """One training: it is done when it has a row in the file of `results`, and scored when that holds a `test`."""

    task: Task
    method: Method | Probe
    lr: float
    seed: int
    steps: int
    results: Path

    @property
    def key(self) -> Key:
        return self.task.name, self.method.name, self.lr, self.seed, self.steps

    @property
    def state(self) -> Path:
        """Where the trained parameters are, while they are needed."""
        name = f"{self.method.name}-{self.lr:g}-{self.seed}-{self.steps}.safetensors"
        return self.results / self.task.name / name

    def read(self) -> dict[str, Any] | None:
        return runs_in(self.results).read().get(self.key)

    def write(self, result: dict[str, Any]) -> None:
        runs_in(self.results).add(result)


def runs_in(results: Path) -> RunsFile:
    """The file of the runs whose results are in this folder."""
    return RunsFile(results, ("task", "method", "lr", "seed", "steps"))


class Progress:
    """Prints what is done, and when the rest should be."""

    def __init__(self) -> None:
        self.start, self.done, self.left = time.perf_counter(), 0, 0

    def line(self, text: str) -> None:
        seconds = time.perf_counter() - self.start
        known = self.done and self.left > 0
        eta = f"{seconds / self.done * self.left / 60:.0f} min left" if known else "time left unknown"
        print(f"[{seconds / 60:.1f} min, {eta}] {text}", flush=True)


def run_all(
    tasks: Iterable[Task],
    methods: Iterable[Method | Probe],
    seeds: Sequence[int],
    setting: Setting,
    results: Path,
    steps: int | None = None,
) -> None:
    """Does every run that has no result yet: tries, choice on dev, the other seeds, test scores.

    `steps` replaces the budget of every task.

    Raises:
        ValueError: if the folder has rows of another model, or of other settings; one table compares methods alone.
    """
    refuse_others(setting, results)
    pairs = [(task, method) for task in tasks for method in methods]
    progress = Progress()
    progress.left = sum(unfinished_steps(task, method, seeds, results, steps or task.steps) for task, method in pairs)
    for task, method in pairs:
        search(task, method, seeds, setting, results, steps or task.steps, progress)
    runs_in(results).tidy()


def refuse_others(setting: Setting, results: Path) -> None:
    """Raise a `ValueError` if a row of these results is of another model or setting."""
    wanted = {"model": name_of(setting.model), **setting.as_json()}
    for key, row in runs_in(results).read().items():
        if others := [name for name, value in wanted.items() if row["settings"].get(name) != value]:
            said = ", ".join(f"{name} {row['settings'].get(name)!r}, not {wanted[name]!r}" for name in others)
            raise ValueError(f"{runs_in(results).told(key)} has {said}: choose another folder with --results.")


def search(
    task: Task,
    method: Method | Probe,
    seeds: Sequence[int],
    setting: Setting,
    results: Path,
    steps: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Chooses the learning rate on dev with `SEARCH_SEED`, then scores test once for each seed at that rate.

    While dev likes the lowest or the highest best, one more is tried beyond it, up to `MOST` in all. Test is first read
    when the choice is made. A tie goes to the smaller rate. Returns the results of the seeds.
    """
    progress = progress or Progress()
    tries = [Run(task, method, lr, SEARCH_SEED, steps, results) for lr in sorted(method.lrs)]
    chosen = best_on_dev(tries, setting, progress)
    while isinstance(method, Method) and method.widen and (lr := beyond([run.lr for run in tries], chosen.lr)):
        tries.append(Run(task, method, lr, SEARCH_SEED, steps, results))
        chosen = best_on_dev(sorted(tries, key=lambda run: run.lr), setting, progress)
    results_of_seeds = []
    for seed in _seeds(method, seeds):
        run = Run(task, method, chosen.lr, seed, steps, results)
        result = finished(run, setting, progress)
        if "test" not in result:
            if not run.state.exists():
                progress.line(f"{_title(run)}: its parameters are gone, it is trained again")
                result = train_run(run, setting, progress)
            score = probe.score_test if isinstance(method, Probe) else training.score_test
            result["test"] = score(task, method, seed, setting, run.state)  # type: ignore[arg-type]
            run.write(result)
            progress.line(f"{_title(run)}: test {result['test']:.4f}")
        run.state.unlink(missing_ok=True)
        results_of_seeds.append(result)
    return results_of_seeds


def beyond(lrs: Sequence[float], best: float) -> float | None:
    """The rate to try next: the rung above or below the best, if that is the highest or the lowest of several."""
    if not 1 < len(lrs) < MOST or min(lrs) < best < max(lrs):
        return None
    rungs = [float(f"{digit}e{exponent}") for exponent in range(-7, 3) for digit in (1, 3)]
    return min(rung for rung in rungs if rung > best) if best == max(lrs) else max(r for r in rungs if r < best)


def best_on_dev(tries: Sequence[Run], setting: Setting, progress: Progress) -> Run:
    """The try with the highest score on development data, the first of equal ones; the others' parameters go."""
    dev = [finished(run, setting, progress)["dev"] for run in tries]
    chosen = tries[dev.index(max(dev))]
    for run in tries:
        if run is not chosen:
            run.state.unlink(missing_ok=True)
    return chosen


def finished(run: Run, setting: Setting, progress: Progress) -> dict[str, Any]:
    """The result of `run`, from its row or by training."""
    if (done := run.read()) is None:
        return train_run(run, setting, progress)
    if done["settings"] != (settings := settings_of(run, setting)):
        raise ValueError(
            f"{runs_in(run.results).told(run.key)} was made with the settings {done['settings']}, this run has "
            f"{settings}. Delete that row, or choose another folder with --results."
        )
    return done


def train_run(run: Run, setting: Setting, progress: Progress) -> dict[str, Any]:
    """The result of `run` by training, which takes the place of one that it may have had."""
    run.state.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    fit = probe.train if isinstance(run.method, Probe) else training.train
    figures = fit(run.task, run.method, run.lr, run.seed, run.steps, setting, run.state)  # type: ignore[arg-type]
    result: dict[str, Any] = {
        "task": run.task.name,
        "method": run.method.name,
        "lr": run.lr,
        "seed": run.seed,
        "steps": run.steps,
        **figures,
        "seconds": round(time.perf_counter() - start, 2),
        "settings": settings_of(run, setting),
        "environment": environment(),
    }
    run.write(result)
    weight = _weight(run.method, run.steps)
    progress.done, progress.left = progress.done + weight, progress.left - weight
    progress.line(f"{_title(run)}: dev {result['dev']:.4f}, {result['seconds']:.0f} s")
    return result


def settings_of(run: Run, setting: Setting) -> dict[str, Any]:
    return {"model": name_of(setting.model), "method": run.method.note, **setting.as_json()}


def name_of(model: str) -> str:
    """The end of a model's path, which says what it is and nothing of the machine."""
    return "/".join(Path(model).parts[-2:])


def _seeds(method: Method | Probe, seeds: Sequence[int]) -> Sequence[int]:
    return (SEARCH_SEED,) if isinstance(method, Probe) else seeds


def _weight(method: Method | Probe, steps: int) -> int:
    """Steps a run counts for in the estimate of the time left; a probe costs about a tenth of a training."""
    return max(1, steps // 10) if isinstance(method, Probe) else steps


def unfinished_steps(task: Task, method: Method | Probe, seeds: Sequence[int], results: Path, steps: int) -> int:
    """Steps that `search` has yet to train, a probe's counted as few."""
    tries = [Run(task, method, lr, SEARCH_SEED, steps, results) for lr in method.lrs]
    done = runs_in(results).read()
    runs = sum(run.key not in done for run in tries)
    for seed in set(_seeds(method, seeds)) - {SEARCH_SEED}:
        runs += not any((key[0], key[1], *key[3:]) == (task.name, method.name, seed, steps) for key in done)
    return runs * _weight(method, steps)


def _title(run: Run) -> str:
    return f"{run.task.name} {run.method.name} {run.lr:g} seed {run.seed}"


def environment() -> dict[str, Any]:
    """What a figure may depend on beside the settings."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "commit": _commit(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit of the code, with `+` behind it if tracked files differ from it."""
    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        folder = Path(__file__).parent
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
