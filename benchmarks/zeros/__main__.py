"""Where the zeros of a language model belong: modules, budgets, candidates; what a training forgets.

    python -m examples.smollm2 smollm2
    python -m benchmarks.zeros --model smollm2 --data FOLDER [--study modules] [--seeds 0 1 2]
    python -m benchmarks.zeros                     # the page of the rows at hand

Each training is a row of `results/zeros/runs.jsonl`: what has a row is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import RESULTS, environment
from benchmarks.zeros import plan as plans
from benchmarks.zeros.data import intents, packed, texts
from benchmarks.zeros.forgetting import answers
from benchmarks.zeros.plan import Plan
from benchmarks.zeros.report import best_rates, runs_in, write_page_of
from benchmarks.zeros.training import Setting, figures_of

OTHER_BLOCKS = 32


def setting_of(options: argparse.Namespace) -> Setting:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    learnt = (texts(options.data / "banking77", tokenizer), intents(options.data / "clinc150", tokenizer))
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    return Setting(
        options.model,
        {data.name: data for data in learnt},
        packed(options.data / "ag_news" / "test.jsonl", tokenizer, blocks=OTHER_BLOCKS),
        answers(base, tokenizer),
    )


def run(plan: Plan, setting: Setting, results: Path) -> None:
    """Do a training, unless it has a row."""
    key = plan.key()
    if tuple(key.values()) in runs_in(results).read():
        return
    print(", ".join(f"{name} {value}" for name, value in key.items() if value or name == "seed"), flush=True)
    figures = figures_of(plan, setting)
    print("  " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None), flush=True)
    runs_in(results).add({**figures, **key, "environment": environment()})  # sparsity is what was asked for


def study(name: str, data: str, seeds: tuple[int, ...], results: Path) -> Iterator[Plan]:
    """The trainings of one study; of rivals seeds beyond the first run at the rate that dev chose."""
    if name == "rivals":
        yield from plans.rivals(data)
        for seed in (seed for seed in seeds if seed):
            yield from best_rates(runs_in(results).read().values(), data, plans.STEPS[data], seed)
    else:
        yield from plans.of_seeds(plans.STUDIES[name](data), seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zeros", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the decoder")
    parser.add_argument("--data", type=Path, help="folder with the folders banking77, clinc150 and ag_news")
    parser.add_argument("--study", nargs="+", choices=("rivals", *plans.STUDIES), default=["rivals", *plans.STUDIES])
    parser.add_argument("--learn", nargs="+", choices=plans.STEPS, default=list(plans.STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "zeros")
    options = parser.parse_args(arguments)
    if options.model is not None:
        if options.data is None:
            parser.error("--data is needed: what is learnt, and texts of another kind")
        torch.set_flush_denormal(True)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        setting = setting_of(options)
        for name in options.study:
            for data in options.learn:
                for plan in study(name, data, tuple(options.seeds), options.results):
                    run(plan, setting, options.results)
        runs_in(options.results).tidy()
    write_page_of(options.results)


if __name__ == "__main__":
    main()
