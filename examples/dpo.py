"""Teach a chat model which of two replies is preferred: DPO with TRL, on pairs that need no reward and no sampling.

    python -m examples.dpo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --max_steps 60 --output_dir out

makes pairs of right and wrong sums; `--largest 9` says how hard they are. Pairs of your own come from `--train_file
pairs.jsonl` (or JSON, Parquet, CSV, TSV): rows with a `prompt`, and a `chosen` and a `rejected` reply. It prints of how
many held-out pairs the preferred reply is the likelier one, before and after, and of sums how many greedy replies are
right; `out/results.json` holds the same with the log of all steps. `--method lora` and `--method full` train the same
steps by LoRA r=8 and of all weights, to compare.

The loss is that of DPO and, beside it, the likelihood of the preferred replies; `--loss_type sigmoid` leaves that out.
The reference is the model without its mask: no second one is loaded. Every argument of `trl.DPOConfig` works
(`--beta`, `--loss_type`, `--max_length`, `--seed`, ...); `--help` lists them. For a mask there is no learning rate to
choose.
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

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from trl import DPOConfig, DPOTrainer

from examples.methods import (
    DTYPES,
    LEARNING_RATES,
    MethodArguments,
    adapter_of,
    load_tokenizer,
    merge_to_generate,
    saved_bytes,
)
from examples.preferences import load_pairs, sum_pairs
from examples.problems import hold_out
from examples.rewards import share_right
from peft_mask import MaskCallback, SparsitySchedule, create_mask_optimizer
from peft_mask.recipes import launched
from peft_mask.recipes.answers import check_whole, greedy_answers, inference, stops_of
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.models import pretrained
from peft_mask.recipes.script import set_device_defaults
from peft_mask.recipes.trainer import OptimizerTrainer

SPARSITY = 0.0001  # as of GRPO: five times as much and a small model answered no sum right any more (docs/dpo.md)
LARGEST, SUMS, SUM_LENGTH = 20, 100, 16  # of the sums, where nothing else is said


@dataclass
class ScriptArguments(MethodArguments):
    """What `DPOConfig` does not say."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSONL, JSON, Parquet, CSV or TSV file of pairs, in place of sums."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Pairs to score; by default a tenth of those to learn from is held out."}
    )
    largest: int | None = field(default=None, metadata={"help": "Largest number of the sums, by default 20."})
    train_pairs: int | None = field(default=None, metadata={"help": "How many sums to learn from, by default 100."})
    test_pairs: int | None = field(default=None, metadata={"help": "How many other sums to score, by default 100."})


class MaskDPOTrainer(OptimizerTrainer, DPOTrainer):
    """TRL's trainer, with the optimizer and the model card of the scripts."""


def pairs_of(
    arguments: ScriptArguments, settings: DPOConfig, tokenizer: Any, model: Any
) -> tuple[Dataset, Dataset, str]:
    """Return pairs to learn from, held-out ones, and what these are called: sums, or those of files.

    Raises:
        ValueError: if arguments do not go together, a file holds something else, or there are not enough pairs.
        FileNotFoundError: if a file does not exist.
    """
    of_sums = {name: getattr(arguments, name) for name in ("largest", "train_pairs", "test_pairs")}
    if arguments.train_file is None:
        if arguments.test_file is not None:
            raise ValueError(
                f"--test_file {arguments.test_file} goes with --train_file; give both, or neither for sums."
            )
        wanted = dict(zip(of_sums, (LARGEST, SUMS, SUMS), strict=True))
        largest, train, test = (wanted[name] if given is None else given for name, given in of_sums.items())
        return *sum_pairs(largest, train, test, settings.seed), f"sums of two numbers up to {largest}"
    for name, given in of_sums.items():
        if given is not None:
            raise ValueError(
                f"--{name} {given} is for sums, and the pairs are those of --train_file {arguments.train_file}; leave "
                "one of the two out."
            )
    checked = (tokenizer, stops_of(model, tokenizer), settings.max_length)
    rows = load_pairs("train_file", arguments.train_file, *checked)
    if arguments.test_file is None:
        learned, scored = hold_out(rows, None, settings.seed)
    else:
        learned, scored = rows, load_pairs("test_file", arguments.test_file, *checked)
    return learned, scored, Path(arguments.test_file or arguments.train_file).name


def trainer_of(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, arguments: ScriptArguments, settings: DPOConfig
) -> DPOTrainer:
    """Put model and pairs together. Without a second model TRL takes for its reference the model without its adapter.

    Raises:
        ValueError: if an argument is for another method, or out of range.
    """
    columns = ["prompt", "chosen", "rejected"]
    settled: dict[str, Any] = {
        "model": model,
        "args": settings,
        "train_dataset": train.select_columns(columns),
        "eval_dataset": test.select_columns(columns),
        "processing_class": tokenizer,
        "peft_config": adapter_of(arguments, SPARSITY),
    }
    if arguments.method != "mask":
        return DPOTrainer(**settled)
    end = 1.0 if arguments.schedule_end is None else arguments.schedule_end
    trainer = MaskDPOTrainer(
        partial(create_mask_optimizer, mask_lr=settings.learning_rate),
        callbacks=[MaskCallback(SparsitySchedule("linear", end=end))],
        **settled,
    )
    merge_to_generate(trainer.model)
    return trainer


def log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return ln p of each row's reply, given what stands before it.

    Args:
        model: a causal language model.
        batch: "input_ids", "attention_mask" and "completion_mask", which is 1 on tokens of the reply: `[rows, tokens]`
            of integers.

    Returns:
        Sums over the tokens of the replies, `[rows]` in float32.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    tokens = batch["input_ids"][:, 1:, None]
    found = logits.gather(2, tokens).squeeze(2) - logits.logsumexp(2)
    return (found * batch["completion_mask"][:, 1:]).sum(1)


def score(trainer: DPOTrainer, tokenizer: Any, rows: Dataset) -> dict[str, float]:
    """Return of how many held-out pairs the chosen reply is likelier than the other, and how many answers are right.

    "preferred" compares ln p of the two replies, without a reference; "right" is of rows that have an "answer", by
    their greedy reply. Both are computed in the precision of the training.
    """
    size, better = trainer.args.per_device_eval_batch_size, 0
    with inference(trainer) as model:
        for batch in DataLoader(trainer.eval_dataset, size, collate_fn=trainer.data_collator):
            chosen, rejected = log_probabilities(model, send_to_device(batch, model.device)).chunk(2)
            better += int((chosen > rejected).sum())
        figures = {"preferred": better / len(rows)}
        if "answer" in rows.column_names:
            replies = greedy_answers(model, tokenizer, rows["prompt"][:], size, SUM_LENGTH)
            figures["right"] = share_right(replies, rows["answer"][:])
    return figures


def print_results(results: dict[str, Any], output: Path) -> None:
    """Print what was learned, and what it took."""
    print(f"\n{results['method']}: {results['steps']} steps in {results['seconds']:.0f} s")
    print(f"\n{'step':>8}{'loss':>10}{'margin':>10}")
    for entry in results["log"]:
        print(f"{entry['step']:>8}{entry['loss']:10.3f}{entry['rewards/margins']:10.3f}")
    print(f"\n{results['test_pairs']} held-out pairs, {results['data']}:")
    words = {"preferred": "the preferred reply is the likelier", "right": "the greedy reply is right"}
    for name, before in results["before"].items():
        print(f"  {words[name]}: {before:.1%} before, {results['after'][name]:.1%} after")
    print(f"{output}: {results['saved_bytes']:,} bytes, {results['trained_parameters']:,} parameters trained")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say, save what was learned, and return the figures that are printed."""
    parser = HfArgumentParser(
        (ScriptArguments, DPOConfig), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(loss_type=["sigmoid", "sft"])  # the latter keeps the chosen replies likely (docs/dpo.md)
    parser.set_defaults(learning_rate=None, logging_steps=5, per_device_train_batch_size=8)
    parser.set_defaults(per_device_eval_batch_size=16, gradient_checkpointing=False, save_strategy="no")
    set_device_defaults(parser)
    try:
        arguments, settings = parser.parse_args_into_dataclasses(args=argv)
        if settings.learning_rate is None:
            settings.learning_rate = LEARNING_RATES[arguments.method]
        check_whole(settings)
        set_seed(settings.seed)
        tokenizer = load_tokenizer(arguments.model_name_or_path)
        options = {"dtype": arguments.dtype or DTYPES[arguments.method], **(settings.model_init_kwargs or {})}
        settings.model_init_kwargs = None  # used up, as TRL is handed a model
        model = pretrained(AutoModelForCausalLM, arguments.model_name_or_path, **options)
        train, test, data = pairs_of(arguments, settings, tokenizer, model)
        trainer = trainer_of(model, tokenizer, train, test, arguments, settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    first, output = trainer.is_world_process_zero(), Path(settings.output_dir)
    before = score(trainer, tokenizer, test) if first else {}
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model()  # before it is scored, which may fail
    after = score(trainer, tokenizer, test) if first else {}
    results = {
        "method": arguments.method,
        "data": data,
        "train_pairs": len(train),
        "test_pairs": len(test),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "before": before,
        "after": after,
        "log": [entry for entry in trainer.state.log_history if "rewards/margins" in entry],
    }
    if first:
        results |= {"saved_bytes": saved_bytes(output), "command": command_of(ScriptArguments, argv, settings)}
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print_results(results, output)
        if isinstance(trainer, MaskDPOTrainer):
            trainer.finish_card = partial(
                write_card,
                output,
                results["command"],
                "text-generation",
                data,
                figures=after,
                facts={"pairs": f"{len(train)} to learn from, {len(test)} held out, of {data}"}
                | {f"{name} without it": f"{value:.4f}" for name, value in before.items()},
            )
            trainer.finish_card()
    if settings.push_to_hub:
        trainer.push_to_hub()
    launched.keep(trainer)
    trainer.accelerator.end_training()
    return results


if __name__ == "__main__":
    launched.run(main)
