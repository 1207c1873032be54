"""`python -m benchmarks.rules --data FOLDER`: the other binarizers, structures and options, beside the default.

Without `--data` it writes the page of the results at hand.

Each is a row of the harness of `benchmarks.accuracy`: the same loop, budgets and data, the rate of the scores chosen on
development data among the few of its row, test read once. The default's figures are those in its results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.accuracy.__main__ import minilm
from benchmarks.accuracy.methods import HEAD_LR, HEAD_NOTE, STEPS_NOTE, mask, mask_adamw
from benchmarks.accuracy.runs import run_all
from benchmarks.accuracy.summary import read_results
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Method, Setting
from benchmarks.harness import RESULTS, table, write_page
from peft_mask import HoldSparsity, MaskConfig, SparsityPenalty, create_mask_optimizer

ADAMW_NOTE = f"scores by AdamW; {HEAD_NOTE}"
TITLE = "The other binarizers, structures and options"
BY_VOTES = f"{STEPS_NOTE}; {HEAD_NOTE}"


def papers_head(model: nn.Module, task_type: str) -> nn.Module:
    """The paper's setting with its random head, which is frozen and masked: of tags as well."""
    return get_peft_model(model, MaskConfig.paper(head="masked"))


def paper(**fields: Any) -> Callable[[nn.Module, str], nn.Module]:
    def build(model: nn.Module, task_type: str) -> nn.Module:
        return get_peft_model(model, MaskConfig.paper(**{"task_type": task_type, "head": "trained"} | fields))

    return build


def by_sigmoid(build: Callable[[nn.Module, str], nn.Module]) -> Callable[[nn.Module, str], nn.Module]:
    """The estimator that multiplies a score's gradient by the derivative of the sigmoid there, not by one."""

    def hooked(model: nn.Module, task_type: str) -> nn.Module:
        built = build(model, task_type)
        for scores in (p for name, p in built.named_parameters() if "peft_mask_scores" in name):
            scores.register_hook(lambda grad, s=scores: grad * s.sigmoid() * (1 - s.sigmoid()))
        return built

    return hooked


def adamw_alone(model: nn.Module, lr: float) -> Optimizer:
    """AdamW for scores whose order alone counts, too, in place of sign steps: it rounds 16 bits to the nearest."""
    return create_mask_optimizer(model, AdamW, lr=HEAD_LR, mask_lr=lr)


def eight_bits(name: str) -> Callable[[nn.Module, float], Optimizer]:
    """An optimizer of bitsandbytes, for scores and head."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        import bitsandbytes  # type: ignore[import-untyped]

        return create_mask_optimizer(model, getattr(bitsandbytes.optim, name), lr=HEAD_LR, mask_lr=lr)

    return build


def penalized(model: nn.Module, lr: float) -> Optimizer:
    optimizer, penalty = mask_adamw(model, lr), SparsityPenalty(0.02)
    optimizer.register_step_pre_hook(lambda *_: penalty(model))
    return optimizer


def held(model: nn.Module, lr: float) -> Optimizer:
    optimizer, hold = mask_adamw(model, lr), HoldSparsity(0.02)
    optimizer.register_step_post_hook(lambda *_: hold(model))
    return optimizer


RULES = {
    method.name: replace(method, widen=False)
    for method in (
        Method("threshold", f"MaskConfig.paper(head='trained'), {ADAMW_NOTE}", paper(), mask_adamw, (1e-3, 3e-3)),
        Method(
            "threshold-head", "MaskConfig.paper(head='masked'), scores by AdamW", papers_head, mask_adamw, (1e-3, 3e-3)
        ),
        Method(
            "sign",
            f"binarizer='sign', every weight kept at the start, {ADAMW_NOTE}",
            mask(binarizer="sign", candidates=None),
            mask_adamw,
            (3e-4, 1e-3),
        ),
        Method(
            "bernoulli",
            f"binarizer='bernoulli', 5 % off at the start, {ADAMW_NOTE}",
            mask(binarizer="bernoulli", candidates=None),
            mask_adamw,
            (3e-2, 1e-1),
        ),
        Method(
            "threshold-sigmoid",
            f"threshold, its gradient times the derivative of the sigmoid, {ADAMW_NOTE}",
            by_sigmoid(paper()),
            mask_adamw,
            (1e-3, 3e-3),
        ),
        Method(
            "bernoulli-sigmoid",
            f"bernoulli, its gradient times the derivative of the sigmoid, {ADAMW_NOTE}",
            by_sigmoid(mask(binarizer="bernoulli", candidates=None)),
            mask_adamw,
            (3e-2, 1e-1),
        ),
        Method(
            "2-of-4",  # the name is that of a file
            f"binarizer='n:m', the smallest half off at the start, {ADAMW_NOTE}",
            mask(binarizer="n:m", candidates=None),
            mask_adamw,
            (1e-3, 3e-3),
        ),
        Method(
            "row",
            f"structure='row', target_sparsity=0.005, {BY_VOTES}",
            mask(structure="row", candidates=None),
            mask_adamw,
            (5e-4,),
        ),
        Method(
            "head",
            f"structure='head', of query, key and value, target_sparsity=0.1, {BY_VOTES}",
            mask(structure="head", candidates=None, target_modules=["query", "key", "value"], target_sparsity=0.1),
            mask_adamw,
            (5e-4,),
        ),
        Method("bfloat16", f"scores_dtype='bfloat16', {BY_VOTES}", mask(scores_dtype="bfloat16"), mask_adamw, (5e-4,)),
        Method("adamw", f"the default, {ADAMW_NOTE}", mask(), adamw_alone, (5e-4,)),
        Method(
            "adamw-bfloat16",
            f"scores_dtype='bfloat16', {ADAMW_NOTE}",
            mask(scores_dtype="bfloat16"),
            adamw_alone,
            (5e-4,),
        ),
        Method(
            "adamw-8bit",
            f"the default, scores and head by bitsandbytes' AdamW8bit; {HEAD_NOTE}",
            mask(),
            eight_bits("AdamW8bit"),
            (5e-4,),
        ),
        Method(
            "lion-8bit",
            f"the default, scores and head by bitsandbytes' Lion8bit; {HEAD_NOTE}",
            mask(),
            eight_bits("Lion8bit"),
            (5e-4,),
        ),
        Method("biases", f"mask_biases=True, {BY_VOTES}", mask(mask_biases=True), mask_adamw, (5e-4,)),
        Method("penalty", f"threshold with SparsityPenalty(0.02), {ADAMW_NOTE}", paper(), penalized, (1e-3, 3e-3)),
        Method("held", f"threshold with HoldSparsity(0.02), {ADAMW_NOTE}", paper(), held, (1e-3, 3e-3)),
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Does the runs without a result, then prints and files the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with one folder a task")
    parser.add_argument("--model", help="name or folder of an encoder; by default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--results", type=Path, default=RESULTS / "rules", help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["trec", "ud_ewt_pos"], metavar="TASK")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--steps", type=int, help="budget of every task, in place of the table's")
    options = parser.parse_args(arguments)
    if options.data is not None:
        torch.set_flush_denormal(True)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        setting = Setting(options.data, options.model or minilm())
        tasks, rules = [TASKS[name] for name in options.tasks], [RULES[name] for name in options.rules]
        run_all(tasks, rules, [0], setting, options.results, options.steps)
    write_page_of(options.results)


def write_page_of(results: Path) -> None:
    write_page(results, TITLE, "python -m benchmarks.rules", figures(results))


def figures(results: Path) -> str:
    """The results in a folder as a table: a line a task and rule, the rate that was chosen, its test score."""
    tasks, names = list(TASKS), list(RULES)
    found = sorted(read_results(results), key=lambda r: (tasks.index(r["task"]), names.index(r["method"]), r["lr"]))
    rows = [
        (
            result["task"],
            result["method"],
            f"{result['lr']:g}",
            f"{100 * result['dev']:.2f}",
            f"{100 * result['test']:.2f}" if "test" in result else "",
            f"{100 * result['sparsity']:.2f} %",
            f"{result['bits_per_weight']:.3f}",
        )
        for result in found
    ]
    return table(("task", "rule", "rate", "dev, %", "test, %", "zeros", "bits a weight"), rows)


if __name__ == "__main__":
    main()
