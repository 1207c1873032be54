"""Teach a chat model to answer, by a mask: supervised fine-tuning with TRL, on the assistant's answers alone.

    python -m examples.sft --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file chats.jsonl \
        --output_dir out --merge_to merged

prints the perplexity of held-out answers and how many of them greedy decoding gives to the letter, before and after.
`out` then holds the adapter and the tokenizer, `merged` an ordinary model that needs neither PEFT nor this package.

A row of a file (JSONL, JSON, Parquet, CSV or TSV) holds `messages`, or a question and its answer in the columns
`prompt` and `completion`. Every argument of `trl.SFTConfig` works (`--max_steps`, `--max_length`, `--packing`,
`--gradient_checkpointing`, `--chat_template_path`, `--eos_token`, ...); `--help` lists them. The mask has no
learning rate; `--learning_rate` is that of the rows of new tokens.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft_mask.recipes import launched
from peft_mask.recipes.answers import check_whole, score, stops_of
from peft_mask.recipes.card import command_of, write_card
from peft_mask.recipes.chat import Message, as_dataset, check_markers, check_rows, load_conversations
from peft_mask.recipes.mask_arguments import MaskArguments, mask_config
from peft_mask.recipes.models import pretrained
from peft_mask.recipes.script import checkpoint_of, set_device_defaults
from peft_mask.recipes.trainer import OptimizerTrainer
from peft_mask.settings.config import MaskConfig
from peft_mask.training.callback import MaskCallback
from peft_mask.training.optimizer import HEAD_LR, create_mask_optimizer


@dataclass
class ScriptArguments(MaskArguments):
    """What `SFTConfig` does not say."""

    model_name_or_path: str = field(metadata={"help": "Causal language model on the Hub, or a folder."})
    train_file: str = field(metadata={"help": "JSONL, JSON, Parquet, CSV or TSV file of conversations."})
    test_file: str | None = field(
        default=None, metadata={"help": "Held-out conversations; by default a tenth of those to learn from."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of questions, if there are no `messages`."})
    completion_column: str = field(default="completion", metadata={"help": "Column of their answers, likewise."})
    system: str | None = field(
        default=None, metadata={"help": "Message of the system, for conversations that have none."}
    )
    add_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Tokens that the template needs; their rows of the embeddings are trained."},
    )
    split_markers: bool = field(
        default=False, metadata={"help": "Let what looks like a token in the template be split, where it is none."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base to NF4, by bitsandbytes."})
    max_new_tokens: int = field(default=32, metadata={"help": "Length that greedy answers are cut to."})
    merge_to: str | None = field(
        default=None, metadata={"help": "Folder for an ordinary model with the mask merged into it."}
    )
    dequantize: bool = field(
        default=False, metadata={"help": "Write the merged model in floats, for programs that read no bitsandbytes."}
    )


def parse(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, SFTConfig]:
    """Read the command line.

    Raises:
        ValueError: if settings do not go together.
    """
    parser = HfArgumentParser(
        (ScriptArguments, SFTConfig), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.set_defaults(learning_rate=HEAD_LR, per_device_train_batch_size=8, save_strategy="no", report_to="none")
    set_device_defaults(parser)
    return parser.parse_args_into_dataclasses(args=argv)


class MaskSFTTrainer(OptimizerTrainer, SFTTrainer):
    """TRL's trainer, with the optimizer and the model card of the scripts."""


def load_tokenizer(arguments: ScriptArguments, settings: SFTConfig) -> Any:
    """Load the tokenizer with the template and the tokens that the arguments ask for.

    Raises:
        ValueError: if there is no such model or template, or the end token is none of its tokens.
    """
    tokenizer = pretrained(AutoTokenizer, arguments.model_name_or_path, trust_remote_code=settings.trust_remote_code)
    if (path := settings.chat_template_path) is not None:
        if Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text("utf-8")
        else:
            try:
                tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
            except OSError:
                raise ValueError(f"--chat_template_path {path}: this is neither a file nor a model.") from None
        settings.chat_template_path = None  # TRL would add all tokens of another model
    tokenizer.add_tokens(arguments.add_tokens or [], special_tokens=True)
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"--eos_token {settings.eos_token} is no token; add it with --add_tokens as well.")
        tokenizer.eos_token = settings.eos_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(arguments: ScriptArguments, settings: SFTConfig) -> PreTrainedModel:
    """Load the base model, in 4 bits if asked to.

    Raises:
        ValueError: if there is no such model.
        ImportError: if bitsandbytes is needed and not installed.
    """
    own: Any = settings.model_init_kwargs or {}
    options = {"trust_remote_code": settings.trust_remote_code, **own}
    settings.model_init_kwargs = None  # used up, as TRL is handed a model
    if arguments.load_in_4bit:
        options["device_map"] = {"": settings.device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        )
    return pretrained(AutoModelForCausalLM, arguments.model_name_or_path, **options)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights of a model are quantized, be it now or in its checkpoint."""
    return getattr(model.config, "quantization_config", None) is not None


def add_rows(model: PreTrainedModel, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Give a model rows for what its tokenizer has more, and return the tokens to train: these, and `tokens`."""
    rows, wanted = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if wanted > rows:
        model.resize_token_embeddings(wanted)
    return sorted({*tokenizer.convert_tokens_to_ids(tokens), *range(rows, wanted)})


def config_beside(arguments: ScriptArguments, model: PreTrainedModel, tokens: list[int]) -> MaskConfig:
    """Return the configuration of a mask beside which the rows of tokens are trained, of both embeddings.

    Raises:
        ValueError: if the budget is out of range, or targets do not go together.
    """
    both = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    tied = model.config.get_text_config().tie_word_embeddings
    rows = tokens if tied else {name: tokens for name, module in model.named_modules() if id(module) in both}
    return mask_config(
        arguments,
        "CAUSAL_LM",
        trainable_token_indices=rows if tokens else None,
        scores_dtype="bfloat16" if is_quantized(model) else "float32",  # to what TRL casts them there
    )


def split(
    arguments: ScriptArguments, settings: SFTConfig, train: list[list[Message]]
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Return conversations to learn from and held-out ones: those of the test file, or a tenth, chosen by the seed.

    Raises:
        ValueError: if there is a single conversation and no test file.
        FileNotFoundError: if the test file does not exist.
    """
    columns = (arguments.prompt_column, arguments.completion_column, arguments.system)
    if arguments.test_file is not None:
        return train, load_conversations("test_file", arguments.test_file, *columns)
    if len(train) < 2:
        raise ValueError(f"{arguments.train_file}: one row cannot be both learned and held out; give --test_file.")
    parts = Dataset.from_dict({"row": range(len(train))}).train_test_split(test_size=0.1, seed=settings.seed)
    return [train[row] for row in parts["train"]["row"]], [train[row] for row in parts["test"]["row"]]


def make_trainer(arguments: ScriptArguments, settings: SFTConfig) -> tuple[MaskSFTTrainer, Dataset]:
    """Put files, tokenizer, model and mask together, and return the trainer and the held-out rows.

    Raises:
        ValueError: if something of them does not go together; the message says what, and what to do.
        FileNotFoundError: if a file does not exist.
        ImportError: if bitsandbytes is needed and not installed.
    """
    check_whole(settings)
    for other in (settings.output_dir, arguments.model_name_or_path):
        if arguments.merge_to is not None and Path(arguments.merge_to).resolve() == Path(other).resolve():
            raise ValueError(f"--merge_to {arguments.merge_to}: this folder is used already; name one of its own.")
    rows = load_conversations(
        "train_file", arguments.train_file, arguments.prompt_column, arguments.completion_column, arguments.system
    )
    train, test = split(arguments, settings, rows)
    tokenizer = load_tokenizer(arguments, settings)
    if not arguments.split_markers:
        check_markers(tokenizer, train)
    model = load_model(arguments, settings)
    if arguments.dequantize and (arguments.merge_to is None or not is_quantized(model)):
        raise ValueError("--dequantize says how a quantized base is merged: give --merge_to, and --load_in_4bit.")
    files = {f"--train_file {arguments.train_file}": rows}
    if arguments.test_file is not None:
        files[f"--test_file {arguments.test_file}"] = test
    keep_end = settings.truncation_mode == "keep_end" and not settings.packing  # which cuts off ends in any case
    stops = stops_of(model, tokenizer)
    for source, conversations in files.items():
        cut = check_rows(source, conversations, tokenizer, stops, settings.max_length, keep_end)
        if cut:
            print(f"{source}: {cut} answers are cut off at --max_length {settings.max_length}.")
    tokens = add_rows(model, tokenizer, arguments.add_tokens or [])
    trainer = MaskSFTTrainer(
        partial(create_mask_optimizer, lr=settings.learning_rate),
        model=model,
        args=settings,
        train_dataset=as_dataset(train),
        eval_dataset=as_dataset(test),
        processing_class=tokenizer,
        peft_config=config_beside(arguments, model, tokens),
        callbacks=[MaskCallback()],
    )
    if tokens:
        # every new row is among the trained ones: PEFT would save both embeddings whole, as their size has changed
        trainer.model.save_pretrained = partial(trainer.model.save_pretrained, save_embedding_layers=False)
        if not hasattr(head := model.get_output_embeddings(), "bias"):
            head.bias = None  # TRL 1.16 asks for it, and PEFT's wrapper around the head has none
    return trainer, as_dataset(test)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train a mask as the arguments say, save it, and return the figures before and after."""
    try:
        arguments, settings = parse(argv)
        set_seed(settings.seed)
        trainer, rows = make_trainer(arguments, settings)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    return learn(trainer, rows, arguments, settings, command_of(ScriptArguments, argv, settings))


def learn(
    trainer: MaskSFTTrainer, rows: Dataset, arguments: ScriptArguments, settings: SFTConfig, command: str
) -> dict[str, dict[str, float]]:
    """Train, save the adapter with its card, and return the figures before and after.

    Args:
        trainer: as `make_trainer` returns it.
        rows: held-out ones, likewise.
        arguments: what both were made of.
        settings: those of the trainer.
        command: what the card says that was typed.
    """
    before, _ = score(trainer, rows, arguments.max_new_tokens)
    trainer.train(resume_from_checkpoint=checkpoint_of(settings))
    trainer.save_model()  # with the tokenizer, its new tokens and its template
    after, answers = score(trainer, rows, arguments.max_new_tokens)
    figures = {"before": before, "after": after}
    if trainer.is_world_process_zero():
        report(arguments, settings, trainer, command, figures, rows, answers)
    if settings.push_to_hub:
        trainer.push_to_hub()
    if arguments.merge_to is not None and trainer.is_world_process_zero():
        merge(trainer, Path(arguments.merge_to), arguments.dequantize)
    launched.keep(trainer)
    trainer.accelerator.end_training()
    return figures


def report(
    arguments: ScriptArguments,
    settings: SFTConfig,
    trainer: MaskSFTTrainer,
    command: str,
    figures: dict[str, dict[str, float]],
    rows: Dataset,
    answers: Sequence[str],
) -> None:
    """Print figures and a few answers, and write the model card."""
    output = Path(settings.output_dir)
    print(f"\n{len(rows)} held-out answers:\n" + "".join(f"{name:>14}" for name in ("", *figures["before"])))
    for when, row in figures.items():
        print(f"{when:>14}" + "".join(f"{value:14.4f}" for value in row.values()))
    for row, answer in list(zip(rows, answers, strict=True))[:3]:
        question, expected = row["prompt"][-1]["content"], row["completion"][0]["content"]
        print(f"\n{question!r}\n  expected {expected!r}\n  answered {answer!r}")
    print(f"\n{output}: {(output / 'adapter_model.safetensors').stat().st_size:,} bytes")
    trainer.finish_card = partial(
        write_card,
        output,
        command,
        "text-generation",
        Path(arguments.test_file or arguments.train_file).name,
        figures=figures["after"],
        facts={"held-out answers": str(len(rows))}
        | {f"{name} without it": f"{value:.4f}" for name, value in figures["before"].items()},
    )
    trainer.finish_card()


def merge(trainer: SFTTrainer, folder: Path, floats: bool) -> None:
    """Write an ordinary model with the mask merged into it: of a base in 4 bits, into its codes, or what these mean."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).merge_and_unload()
    (dequantized(model) if floats else model).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    print(f"{folder}: an ordinary model, {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of floats with the values of a quantized one, which is used up."""
    model = model.dequantize()
    # transformers 5.23 does not save the model itself: it remembers how it was loaded, and cannot reverse that
    plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
