"""LoRA's files in few bits: what a trained adapter is worth once it is quantised, without more training.

    python -m benchmarks.accuracy.quantized --data FOLDER [--tasks ...] [--ranks 4 8 16] [--seeds 0 1 2]

Each adapter is trained once, at the rate that dev chose for it in float32 (so LoRA's own rows come first), and scored
in each number of bits. Rows go into the same file.

Round to nearest: of each 64 numbers in a row the codes are odd multiples of a scale in bfloat16, the one of 32 with the
smallest squared error. With one bit that is the sign times, nearly, the mean magnitude.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.accuracy.__main__ import RESULTS, minilm
from benchmarks.accuracy.methods import BITS, METHODS, RANKS, quantized_name
from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.runs import Run, environment, refuse_others, runs_in, settings_of
from benchmarks.accuracy.sizes import in_head, measure
from benchmarks.accuracy.summary import read_results, rows_of
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.training import Method, Setting, accuracy, restored, train

GROUP = 64
NOTE = f"rounded to {{}} bits in groups of {GROUP}, no more training; "


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 of (groups, 64), and the groups' scales in bfloat16; what is left of the last group is 0."""
    flat = values.detach().float().flatten()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    is_own = (torch.arange(groups.numel()) < len(flat)).view_as(groups)
    widest = groups.abs().amax(1, keepdim=True) / (2**bits - 1)
    best = torch.full_like(widest, torch.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(widest, dtype=torch.bfloat16)
    for part in torch.linspace(1 / 32, 1, 32):
        scale = (part * widest).bfloat16()
        tried = _nearest(groups, scale, bits)
        error = ((groups - _values(tried, scale, bits)) * is_own).square().sum(1, keepdim=True)
        better = error < best
        best, codes, scales = (
            torch.where(better, new, old) for new, old in ((error, best), (tried, codes), (scale, scales))
        )
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return what codes and scales stand for, in the shape and dtype of `like`."""
    return _values(codes, scales, bits).flatten()[: like.numel()].view_as(like).to(like.dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes as they lie in a file: 8 / bits of them a byte."""
    apart = codes.view(-1, 8 // bits).int() << torch.arange(0, 8, bits, dtype=torch.int32)
    return apart.sum(1).to(torch.uint8)


def _nearest(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    steps = (groups / scale.float().clamp_min(torch.finfo(torch.float32).tiny) + 2**bits - 1) / 2
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _values(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (2 * codes.float() - (2**bits - 1)) * scales.float()


def score(run: Run, setting: Setting, bits: int, folder: Path) -> dict[str, Any]:
    """Return the figures of a trained adapter in so many bits; what is saved is what is scored."""
    model = restored(run.task, cast(Method, run.method), run.seed, setting, run.state)
    file: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if in_head(name):
            file[name] = parameter.detach().clone()
            continue
        codes, scales = quantize(parameter, bits)
        file[name] = torch.cat([scales.view(torch.uint8).flatten(), packed(codes, bits)])  # one name for both
        with torch.no_grad():
            parameter.copy_(dequantize(codes, scales, bits, parameter))
    save_file(file, folder / "adapter.safetensors")
    scores = {split: accuracy(model, setting.rows(run.task, split)) for split in ("dev", "test")}
    return scores | measure(folder) | {"dtype": f"{bits} bits"}


def run_all(task: Task, rank: int, seed: int, setting: Setting, results: Path) -> None:
    """Train an adapter once, if one of its rows is missing, and write a row for each number of bits."""
    method = cast(Method, METHODS[f"lora-r{rank}"])
    run = Run(task, method, chosen_rate(task, method, results), seed, task.steps, results)
    missing = {bits: one for bits in BITS if (one := quantized(run, rank, bits)).read() is None}
    if not missing:
        return
    run.state.parent.mkdir(parents=True, exist_ok=True)
    figures = train(task, method, run.lr, seed, task.steps, setting, run.state)
    for bits, one in missing.items():
        with tempfile.TemporaryDirectory() as folder:
            scored = score(run, setting, bits, Path(folder))
        key = {"task": task.name, "method": one.method.name, "lr": run.lr, "seed": seed, "steps": task.steps}
        one.write(key | figures | scored | {"settings": settings_of(one, setting), "environment": environment()})
        print(f"{task.name} {one.method.name} seed {seed}: test {scored['test']:.4f}", flush=True)
    run.state.unlink()


def quantized(run: Run, rank: int, bits: int) -> Run:
    """Return a run of LoRA as the one whose row says how it does in so many bits."""
    method = cast(Method, run.method)
    return replace(run, method=replace(method, name=quantized_name(rank, bits), note=NOTE.format(bits) + method.note))


def chosen_rate(task: Task, method: Method, results: Path) -> float:
    """Return LoRA's rate, of which dev chose and test was scored."""
    for row in rows_of(read_results(results)):
        if (row.task, row.method, row.steps) == (task.name, method.name, task.steps):
            return row.lr
    raise SystemExit(f"{method.name} on {task.name} has no test score yet: run python -m benchmarks.accuracy first.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.quantized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder a task")
    parser.add_argument("--model", help="name or folder of an encoder; by default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    setting = Setting(options.data, options.model or minilm())
    refuse_others(setting, options.results)
    for task in options.tasks:
        for rank in options.ranks:
            for seed in options.seeds:
                run_all(TASKS[task], rank, seed, setting, options.results)
    runs_in(options.results).tidy()
    print(write_report(options.results))


if __name__ == "__main__":
    main()
