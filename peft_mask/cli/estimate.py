"""`peft-mask estimate`: what training a mask takes, from the configuration of a model alone."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_mask.cli.answer import Answer, columns, facts, size
from peft_mask.cli.base import CLASSES, config_of
from peft_mask.server.loading import quietly
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import DEFAULT_SPARSITY
from peft_mask.training.cards import longest, quantize_shapes, usable
from peft_mask.training.memory import TrainingMemory, training_memory

_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
_NAMED = {  # as `train` calls them
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
    "chat": "CAUSAL_LM",
}
_STEPS = ("sign", "sign_in_backward", "adamw", "adamw_8bit")
_DTYPES = ("float32", "bfloat16", "float16")
_PARTS = {
    "parameters": "base model",
    "scores": "scores and their positions",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "transient": "one layer at a time",
}


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "estimate",
        help="memory of a training, from a model's configuration alone",
        description="Estimate what a training step of a mask takes, and whether a card has room for it. Only the\n"
        "model's configuration is read: it needs no weights. Of a card 1 GiB and 5 % are set aside.",
        epilog="examples:\n  peft-mask estimate --model bert --task SEQ_CLS --batch 32 --tokens 128\n"
        "  peft-mask estimate --model meta-llama/Llama-3.2-1B --card 24GB\n"
        "  peft-mask estimate --model meta-llama/Llama-3.1-8B --nf4 --card 24GB --json",
    )
    one.add_argument("--model", required=True, help="a folder, an id on the Hub, or a type such as bert")
    one.add_argument("--task", type=_task, default="CAUSAL_LM", help=f"{', '.join(_TASKS)}, or as train calls it")
    one.add_argument("--batch", type=_number, default=1, metavar="N", help="rows of a batch, by default 1")
    one.add_argument("--tokens", type=_number, default=512, metavar="N", help="tokens of a row, by default 512")
    one.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the base, by default bfloat16")
    one.add_argument("--nf4", action="store_true", help="linear layers of the base in 4 bits")
    one.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    one.add_argument("--target-modules", nargs="+", metavar="NAME", help="what is masked, by default all that can be")
    one.add_argument("--sparsity", type=float, default=DEFAULT_SPARSITY, help="share that is off, by default 0.005")
    one.add_argument("--scores-dtype", choices=_DTYPES[:2], default="float32", help="by default float32")
    one.add_argument("--steps", choices=_STEPS, default="sign", help="optimizer of the scores, by default sign")
    one.add_argument("--card", type=gibibytes, metavar="SIZE", help="memory of a card, such as 24GB")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Estimate a training."""
    from peft_mask.analysis.storage import storage  # with which all analyses are imported

    shape = _shape_of(options.model)
    most = _longest_of(shape)
    if most is not None and options.tokens > most:
        raise ValueError(f"--tokens {options.tokens}: '{options.model}' is made for rows of {most} tokens at most.")
    config = MaskConfig(
        task_type=options.task,
        target_sparsity=options.sparsity,
        scores_dtype=options.scores_dtype,
        target_modules=options.target_modules,
    )

    def needs(tokens: int, rows: int = 1) -> TrainingMemory:
        model = _model(options, shape)
        return training_memory(model, config, _batch(options.task, rows, tokens), options.steps)

    with quietly():
        memory = needs(options.tokens, options.batch)
    with torch.device("meta"), quietly():
        disk = storage(CLASSES[options.task].from_config(shape), config, options.sparsity)
    data: dict[str, Any] = {
        "model": options.model,
        "tokens": options.tokens,
        "batch": options.batch,
        "bytes": dict(vars(memory)) | {"total": memory.total},
        "adapter_bytes": disk.mask,
        "card": None,
    }
    unit, step = ("GiB", 2**30) if memory.total >= 2**33 else ("MiB", 2**20)
    parts = {said: getattr(memory, part) for part, said in _PARTS.items()} | {"together": memory.total}
    rows = [{"what for": said, unit: f"{held / step:,.2f}"} for said, held in parts.items()]
    text = [
        facts(
            {
                "model": options.model,
                "step": f"{options.batch} x {options.tokens} tokens, "
                f"{'4 bits and ' if options.nf4 else ''}{options.dtype}, "
                f"{'no ' if options.no_checkpointing else ''}activation checkpointing",
                "adapter": f"about {size(disk.mask)}, beside a task head",
            }
        ),
        columns(rows),
    ]
    if options.card is not None:
        room = usable(options.card)
        fits = memory.total <= room
        row = longest(room, lambda tokens: needs(tokens).total, most) if most else None
        data["card"] = {"gib": options.card, "usable_bytes": int(room), "fits": fits, "longest_row": row}
        said = "fits" if fits else "does not fit"
        text.append(f"It {said} a card of {options.card:g} GB, of which {room / 2**30:.1f} are there for tensors.")
        if row is not None:
            text[-1] += f" The longest row, one a step: {row:,} tokens." if row else " Not even one short row does."
    return Answer(data, "\n\n".join(text))


def gibibytes(text: str) -> float:
    """Return the memory of a card in GiB, as cards are sold: 24GB and 24 both mean 24 GiB.

    Raises:
        argparse.ArgumentTypeError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if found is None or not 1 < float(found[1]) < 100_000:
        raise argparse.ArgumentTypeError(f"expected the memory of a card, such as 24GB, got {text!r}")
    return float(found[1])


def _task(text: str) -> str:
    task = _NAMED.get(text, text)
    if task not in _TASKS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join([*_TASKS, *_NAMED])}, got {text!r}")
    return task


def _number(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _shape_of(model: str) -> Any:
    if model in CONFIG_MAPPING:
        return AutoConfig.for_model(model)
    return config_of(model)


def _model(options: argparse.Namespace, shape: Any) -> Any:
    try:
        with torch.device("meta"):
            model = CLASSES[options.task].from_config(shape, dtype=getattr(torch, options.dtype))
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers has no model for --task {options.task} of the type '{shape.model_type}': choose another of "
            f"{', '.join(_TASKS)}."
        ) from error
    if options.nf4:
        quantize_shapes(model.base_model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if not options.no_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _batch(task: str, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    labels = torch.zeros(rows, dtype=torch.long, device="meta") if task == "SEQ_CLS" else ids
    return {"input_ids": ids, "labels": labels}


def _longest_of(shape: Any) -> int | None:
    """Tokens of the longest row that a model is made for; None if its configuration does not say."""
    most = getattr(shape, "max_position_embeddings", None) or getattr(shape, "n_positions", None)
    return most if isinstance(most, int) and 0 < most < 1 << 24 else None
