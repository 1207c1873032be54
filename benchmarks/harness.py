"""Timing variants in turn in one process, and writing figures down together with where they come from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True)
class Times:
    """Seconds of each counted run of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, base: Times) -> tuple[float, float, float]:
        """Median, smallest and largest of the ratios round by round, which a drifting machine disturbs least."""
        ratios = [own / other for own, other in zip(self.seconds, base.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def in_turn(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
) -> dict[str, Times]:
    """Run all variants once a round, A B C A B C ..., and time each run.

    Args:
        variants: name -> what to time; called `warmup + rounds` times.
        rounds: counted rounds.
        warmup: rounds not counted.
        clock: `time.process_time` for the time that the process had a processor, of all its threads.
        device: what they run on; a run ends when that is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in variants.items():
            wait_for(device)
            start = clock()
            run()
            wait_for(device)
            elapsed = clock() - start
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Times(tuple(runs)) for name, runs in seconds.items()}


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Return the largest number of bytes that tensors allocated on `device` in `run` held at one time."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure depends on besides the code: machine, threads, versions, commit."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        **({"gpu": gpu, "cuda": torch.version.cuda} if gpu else {}),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a markdown table."""
    lines = [" | ".join(map(str, row)) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def write_page(folder: Path, title: str, command: str, body: str) -> None:
    """Print a table of the rows in `folder`, and file it beside them."""
    print(body)
    told = f"Written by `{command}` from the rows of [runs.jsonl](runs.jsonl), one a training."
    (folder / "README.md").write_text(f"# {title}\n\n{told}\n\n{body}\n", "utf-8")


def together(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one environment of several, which has all the values of what differs."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in environments for key in each):
        values = [each[key] for each in environments if key in each]
        if isinstance(values[0], Mapping):
            merged[key] = together(values)
        else:
            different = list(dict.fromkeys(values))
            merged[key] = different[0] if len(different) == 1 else ", ".join(sorted(map(str, different)))
    return merged


def report(
    name: str,
    title: str,
    body: str,
    figures: Any,
    folder: Path | None = None,
    device: str = "cpu",
    where: Mapping[str, Any] | None = None,
) -> None:
    """Print a result and file it as `<name>.md` and `<name>.json`, with the environment beside it.

    That is this one, if `where` does not say in which the figures were made. Those of a GPU go to a folder of their
    own, if `folder` does not say where.
    """
    folder = folder or (RESULTS / "gpu" if torch.device(device).type == "cuda" else RESULTS)
    where = where or environment(device)
    versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
    gpu = f"{where['gpu']}, CUDA {where['cuda']}; " if "gpu" in where else ""
    footer = (
        f"{gpu}{where['cpu']}, {where['cores']} cores, {where['threads']} threads; "
        f"Python {where['python']}, {versions}; commit {where['commit']}, {where['date']}."
    )
    text = f"# {title}\n\n{body}\n\n{footer}\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({"environment": where, "figures": figures}, indent=1) + "\n")
