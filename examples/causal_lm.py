"""Learn masks for files of texts, one mask a file, with any causal language model, and generate with all of them.

    python -m examples.causal_lm --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_files recipes.jsonl poems.txt \
        --output_dir out

prints the perplexity of held-out texts for the base model and with each mask, and continues a few prompts: without a
mask, with each, and with all of them mixed in one batch. `out/recipes` and `out/poems` then hold the adapters.

Files may be CSV, TSV, JSON, JSONL or Parquet with a column of texts, or TXT with a text a line. Every argument of
`transformers.TrainingArguments` works (`--max_steps`, `--per_device_train_batch_size`, `--seed`, `--bf16`, ...);
`--help` lists them. There is no learning rate to choose: a mask is the same with any. `--target_bytes 200000` asks for
masks of 200 kB.
"""

from __future__ import annotations

import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_mask import MaskCallback, MaskConfig, create_mask_optimizer
from peft_mask.recipes import launched
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.causal_lm import as_dataset, hold_out, load_texts, pack
from peft_mask.recipes.models import pretrained

BASE = "__base__"  # PEFT's name for rows of a batch without an adapter


@dataclass
class ScriptArguments:
    """What `TrainingArguments` does not say."""

    model_name_or_path: str = field(metadata={"help": "Causal language model on the Hub, or a folder."})
    train_files: list[str] = field(
        metadata={"help": "CSV, TSV, JSON, JSONL, Parquet or TXT files; each gets a mask of its own."}
    )
    test_files: list[str] | None = field(default=None, metadata={"help": "Held-out texts, a file for each train file."})
    names: list[str] | None = field(
        default=None, metadata={"help": "Names of the masks, by default those of the files."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int = field(default=128, metadata={"help": "Texts are joined and cut into blocks of this many tokens."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights to switch off."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of a mask's file, in its place."})
    prompts: list[str] = field(
        default_factory=lambda: ["I", "How do I", "Can you"], metadata={"help": "Beginnings that are continued."}
    )
    max_new_tokens: int = field(default=20, metadata={"help": "Length of the continuations."})


def load_splits(arguments: ScriptArguments, seed: int) -> dict[str, tuple[Dataset, Dataset]]:
    """Load (training rows, held-out rows) by the name of the mask that will be learned from them.

    Without test files a tenth of the training rows, chosen by `seed`, is held out.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file cannot be read, or names or test files do not match the train files.
    """
    files = arguments.train_files
    names = arguments.names or [Path(file).stem for file in files]
    if len(names) != len(files) or len(set(names)) != len(names) or BASE in names:
        raise ValueError(f"{len(files)} masks need as many distinct names, got {names}; choose them with --names.")
    if arguments.test_files is not None and len(arguments.test_files) != len(files):
        raise ValueError(f"--test_files: expected {len(files)}, one for each train file, got {arguments.test_files}.")
    splits = {}
    for index, (name, file) in enumerate(zip(names, files, strict=True)):
        train = load_texts("train_files", file, arguments.text_column)
        if arguments.test_files is not None:
            splits[name] = train, load_texts("test_files", arguments.test_files[index], arguments.text_column)
        else:
            parts = hold_out(train, seed)
            splits[name] = parts["train"], parts["test"]
    return splits


def with_masks(base: PreTrainedModel, names: Sequence[str], arguments: ScriptArguments) -> PeftModel:
    """Wrap a model for masks of these names.

    Raises:
        ValueError: if the sparsity or the bytes asked for are out of range.
    """
    budget = {"target_sparsity": arguments.target_sparsity, "target_bytes": arguments.target_bytes}
    # a config for each: it holds the sparsity that target_bytes turns out to be
    configs = {name: MaskConfig(task_type="CAUSAL_LM", **budget) for name in names}
    model = get_peft_model(base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    return model


def use(model: PeftModel, name: str) -> Any:
    """Return the context in which the model computes with the mask `name`, or without any for `BASE`."""
    if name == BASE:
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()


def generate(
    model: PeftModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, **options: Any
) -> list[str]:
    """Continue each prompt as the beginning of a text, with the most likely token at each place."""
    starts = [tokenizer.eos_token + prompt for prompt in prompts]  # in the blocks, a text follows the end of another
    inputs = tokenizer(starts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options
        )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def train_mask(model: PeftModel, name: str, blocks: torch.Tensor, arguments: TrainingArguments) -> Trainer:
    """Train the mask `name`, which is active afterwards, and return its trainer."""
    model.set_adapter(name)
    trainer = Trainer(
        model=model,
        args=replace(arguments, output_dir=str(Path(arguments.output_dir, name))),
        train_dataset=as_dataset(blocks),
        optimizers=(create_mask_optimizer(model), None),  # None: the schedule of the arguments
        callbacks=[MaskCallback()],
    )
    trainer.train()
    return trainer


def perplexity(trainer: Trainer, blocks: torch.Tensor) -> float:
    """Return exp(mean negative log-likelihood of a token) under the trainer's model as it is."""
    return math.exp(trainer.evaluate(as_dataset(blocks))["eval_loss"])


def print_perplexities(figures: dict[str, dict[str, float]]) -> None:
    """Print a line for the base model and each mask, a column for each file of texts."""
    columns = list(figures[BASE])
    print("\nperplexity of held-out texts:\n" + "".join(f"{name:>14}" for name in ("", *columns)))
    for name, row in figures.items():
        label = "base model" if name == BASE else f"mask {name}"
        print(f"{label:>14}" + "".join(f"{row[column]:14.2f}" for column in columns))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the masks as the arguments say, save them, and return the figures and texts that are printed."""
    parser = HfArgumentParser(
        (ScriptArguments, TrainingArguments), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(per_device_train_batch_size=2, save_strategy="no", logging_steps=10)
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
    arguments, training_arguments = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training_arguments.seed)
    first = training_arguments.process_index == 0  # of several processes that one writes and prints

    try:
        splits = load_splits(arguments, training_arguments.seed)
        tokenizer = pretrained(AutoTokenizer, arguments.model_name_or_path, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        blocks = {
            name: [pack(rows[arguments.text_column], tokenizer, arguments.block_size) for rows in parts]
            for name, parts in splits.items()
        }
        base = pretrained(AutoModelForCausalLM, arguments.model_name_or_path)
        model = with_masks(base, list(blocks), arguments)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    for name, (train, _) in blocks.items():
        if first:
            print(f"mask {name}: {train.numel():,} tokens to learn from")
        trainer = train_mask(model, name, train, training_arguments)
    output = Path(training_arguments.output_dir)
    if first:
        model.save_pretrained(output)  # each adapter in a folder of its name

    figures: dict[str, dict[str, float]] = {}
    texts: dict[str, list[str]] = {}
    model.eval()
    for name in (BASE, *blocks):
        with use(model, name):
            figures[name] = {column: perplexity(trainer, test) for column, (_, test) in blocks.items()}
            if first:
                texts[name] = generate(model, tokenizer, arguments.prompts, arguments.max_new_tokens)
    launched.keep(trainer)
    trainer.accelerator.end_training()
    if not first:
        return {"perplexity": figures}
    print_perplexities(figures)

    for file, (name, (train, test)) in zip(arguments.test_files or arguments.train_files, blocks.items(), strict=True):
        write_card(
            output / name,
            command_of(ScriptArguments, argv, training_arguments),
            "text-generation",
            Path(file).name,
            figures={"perplexity": figures[name][name]},
            facts={
                "train tokens": f"{train.numel():,}",
                "test tokens": f"{test.numel():,}",
                "perplexity without it": f"{figures[BASE][name]:.4f}",
            },
        )

    rows = [(prompt, name) for prompt in arguments.prompts for name in texts]
    mixed = generate(
        model,
        tokenizer,
        [prompt for prompt, _ in rows],
        arguments.max_new_tokens,
        adapter_names=[name for _, name in rows],
    )
    print("\none batch, a mask a row:")
    for (_, name), text in zip(rows, mixed, strict=True):
        print(f"{'base model' if name == BASE else f'mask {name}':>14}  {text!r}")
    alone = [texts[name][arguments.prompts.index(prompt)] for prompt, name in rows]
    same = sum(one == other for one, other in zip(mixed, alone, strict=True))
    print(f"{same} of {len(rows)} are the same, letter for letter, when each mask has a batch of its own\n")

    for name in blocks:
        print(f"{output / name}: {(output / name / 'adapter_model.safetensors').stat().st_size:,} bytes")
    return {"perplexity": figures, "texts": dict(zip(rows, mixed, strict=True)), "same": same}


if __name__ == "__main__":
    launched.run(main)
