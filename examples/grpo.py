"""Teach a chat model to calculate by reinforcement learning: GRPO with TRL and a reward that can be verified.

    python -m examples.grpo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --max_steps 100 --output_dir out

asks sums of two numbers and rewards a reply that ends in the right one; `--largest 9` says how hard they are. Problems
of your own come from `--train_file problems.jsonl` (or JSON, Parquet, CSV, TSV): rows with a `prompt`, a text or a list
of messages, and its `answer`, a number. It prints how many held-out answers are right before and after, and the reward
in between; `out/results.json` holds the same with the log of all steps. `--method lora` and `--method full` train the
same steps by LoRA r=8 and of all weights, to compare.

Every argument of `trl.GRPOConfig` works (`--num_generations`, `--beta`, `--temperature`, `--learning_rate`, `--seed`,
...); `--help` lists them. For a mask there is no learning rate to choose.
"""

from __future__ import annotations

import json
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from trl import GRPOConfig, GRPOTrainer

from examples.arithmetic import sums
from examples.methods import (
    DTYPES,
    LEARNING_RATES,
    MethodArguments,
    adapter_of,
    load_tokenizer,
    merge_to_generate,
    saved_bytes,
)
from examples.problems import hold_out, load_problems, take
from examples.rewards import correct, share_right
from peft_mask import MaskCallback, SparsitySchedule, create_mask_optimizer
from peft_mask.recipes import launched
from peft_mask.recipes.answers import check_whole, greedy_answers, inference
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.models import pretrained
from peft_mask.recipes.script import set_device_defaults
from peft_mask.recipes.trainer import OptimizerTrainer

SPARSITY = 0.0001  # votes are noisy: with five times as many a small model was never right any more (docs/grpo.md)
LARGEST, SUMS, SUM_LENGTH = 20, 100, 16  # of the sums, where nothing else is said


@dataclass
class ScriptArguments(MethodArguments):
    """What `GRPOConfig` does not say."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSONL, JSON, Parquet, CSV or TSV file of problems, in place of sums."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Problems to score; by default a tenth of those to learn from is held out."}
    )
    largest: int | None = field(default=None, metadata={"help": "Largest number of the sums, by default 20."})
    train_problems: int | None = field(
        default=None, metadata={"help": "How many to learn from, by default 100 sums, or all rows of the file."}
    )
    test_problems: int | None = field(
        default=None, metadata={"help": "How many to score, by default 100 other sums, or all rows of the file."}
    )


def problems_of(arguments: ScriptArguments, tokenizer: Any, seed: int) -> tuple[Dataset, Dataset, str]:
    """Return problems to learn from, held-out ones, and what these are called: sums, or those of files.

    Raises:
        ValueError: if arguments do not go together, a file holds something else, or there are not enough problems.
        FileNotFoundError: if a file does not exist.
    """
    learned, scored = arguments.train_problems, arguments.test_problems
    if arguments.train_file is None:
        if arguments.test_file is not None:
            raise ValueError(
                f"--test_file {arguments.test_file} goes with --train_file; give both, or neither for sums."
            )
        largest = LARGEST if arguments.largest is None else arguments.largest
        counts = [SUMS if count is None else count for count in (learned, scored)]
        return *sums(largest, *counts, seed), f"sums of two numbers up to {largest}"
    if arguments.largest is not None:
        raise ValueError(
            f"--largest {arguments.largest} is for sums, and the problems are those of --train_file "
            f"{arguments.train_file}; leave one of the two out."
        )
    train = load_problems("train_file", arguments.train_file, tokenizer)
    if arguments.test_file is None:
        train, test = hold_out(train, scored, seed)
    else:
        test = take(load_problems("test_file", arguments.test_file, tokenizer), "test_problems", scored)
    return take(train, "train_problems", learned), test, Path(arguments.test_file or arguments.train_file).name


class MaskGRPOTrainer(OptimizerTrainer, GRPOTrainer):
    """TRL's trainer, with the optimizer and the model card of the scripts."""


def check_enough(train: Dataset, settings: GRPOConfig) -> None:
    """Raise ValueError if there are fewer problems than a step asks: TRL would end without a step."""
    asked = settings.generation_batch_size // settings.num_generations
    if len(train) < asked:
        raise ValueError(
            f"{len(train)} problems to learn from are too few for one step, which asks {asked} different ones; add "
            "some, or lower --per_device_train_batch_size or --gradient_accumulation_steps."
        )


def trainer_of(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, arguments: ScriptArguments, settings: GRPOConfig
) -> GRPOTrainer:
    """Put model, problems and reward together.

    Raises:
        ValueError: if an argument is for another method, or out of range.
    """
    settled: dict[str, Any] = {
        "model": model,
        "reward_funcs": correct,
        "args": settings,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "peft_config": adapter_of(arguments, SPARSITY),
    }
    if arguments.method != "mask":
        return GRPOTrainer(**settled)
    end = 1.0 if arguments.schedule_end is None else arguments.schedule_end
    trainer = MaskGRPOTrainer(
        partial(create_mask_optimizer, mask_lr=settings.learning_rate),
        callbacks=[MaskCallback(SparsitySchedule("linear", end=end))],
        **settled,
    )
    merge_to_generate(trainer.model)
    return trainer


def accuracy(trainer: GRPOTrainer, tokenizer: Any, rows: Dataset) -> float:
    """Return of how many rows the most likely reply is right, computed in the precision of the training."""
    settings = trainer.args
    with inference(trainer) as model:
        batch, length = settings.per_device_eval_batch_size, settings.max_completion_length
        replies = greedy_answers(model, tokenizer, rows["prompt"][:], batch, length)
    return share_right(replies, rows["answer"][:])


def print_results(results: dict[str, Any], output: Path) -> None:
    """Print what was learned, and what it took."""
    print(f"\n{results['method']}: {results['steps']} steps in {results['seconds']:.0f} s")
    print(f"\n{'step':>8}{'reward':>10}")
    for entry in results["log"]:
        print(f"{entry['step']:>8}{entry['reward']:10.3f}")
    shares = f"{results['before']:.1%} before, {results['after']:.1%} after"
    print(f"\nheld-out answers that are right: {shares} ({results['test_problems']} problems, {results['data']})")
    print(f"{output}: {results['saved_bytes']:,} bytes, {results['trained_parameters']:,} parameters trained")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say, save what was learned, and return the figures that are printed."""
    parser = HfArgumentParser(
        (ScriptArguments, GRPOConfig), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(learning_rate=None, max_completion_length=None, logging_steps=5)
    parser.set_defaults(per_device_train_batch_size=16, per_device_eval_batch_size=32, num_generations=4)
    parser.set_defaults(gradient_checkpointing=False, save_strategy="no")
    set_device_defaults(parser)
    try:
        arguments, settings = parser.parse_args_into_dataclasses(args=argv)
        if settings.learning_rate is None:
            settings.learning_rate = LEARNING_RATES[arguments.method]
        if settings.max_completion_length is None:
            own = arguments.train_file is not None
            settings.max_completion_length = GRPOConfig.max_completion_length if own else SUM_LENGTH
        check_whole(settings)
        set_seed(settings.seed)
        tokenizer = load_tokenizer(arguments.model_name_or_path)
        train, test, data = problems_of(arguments, tokenizer, settings.seed)
        check_enough(train, settings)
        options = {"dtype": arguments.dtype or DTYPES[arguments.method], **(settings.model_init_kwargs or {})}
        settings.model_init_kwargs = None  # used up, as TRL is handed a model
        model = pretrained(AutoModelForCausalLM, arguments.model_name_or_path, **options)
        trainer = trainer_of(model, tokenizer, train, test, arguments, settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    first, output = trainer.is_world_process_zero(), Path(settings.output_dir)
    before = accuracy(trainer, tokenizer, test) if first else None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model()  # before it is scored, which may fail
    after = accuracy(trainer, tokenizer, test) if first else None
    results = {
        "method": arguments.method,
        "data": data,
        "train_problems": len(train),
        "test_problems": len(test),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "before": before,
        "after": after,
        "log": [entry for entry in trainer.state.log_history if "reward" in entry],
    }
    if first:
        results |= {"saved_bytes": saved_bytes(output), "command": command_of(ScriptArguments, argv, settings)}
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print_results(results, output)
        if isinstance(trainer, MaskGRPOTrainer):
            trainer.finish_card = partial(
                write_card,
                output,
                results["command"],
                "text-generation",
                data,
                figures={"accuracy": results["after"]},
                facts={
                    "problems": f"{len(train)} to learn from, {len(test)} held out, of {data}",
                    "accuracy without it": f"{results['before']:.4f}",
                },
            )
            trainer.finish_card()
    if settings.push_to_hub:
        trainer.push_to_hub()
    launched.keep(trainer)
    trainer.accelerator.end_training()
    return results


if __name__ == "__main__":
    launched.run(main)
