"""`python -m peft_mask.analysis`: the analyses that need no data, of adapters on disk."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_mask.analysis.controls import magnitude_masks, shuffled
from peft_mask.analysis.similarity import block, dissimilarity, each, iou, movement, whole
from peft_mask.analysis.storage import paper_config, storage
from peft_mask.analysis.tables import markdown
from peft_mask.format.masks import Masks
from peft_mask.model.carried import carry
from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import DEFAULT_SPARSITY

_GROUPS = {"matrix": each, "block": block, "all": whole}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse a command line and print a table."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _storage(options: argparse.Namespace) -> str:
    known = options.model in CONFIG_MAPPING
    shape = AutoConfig.for_model(options.model) if known else AutoConfig.from_pretrained(options.model)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(shape)
    mega = 1e6
    found = {"the paper's, raw bits": storage(model, paper_config(options.blocks))} if options.blocks else {}
    coded = storage(model, MaskConfig(task_type="SEQ_CLS"), options.sparsity)
    found[f"MaskConfig(), {options.sparsity:.2%} off, coded"] = coded
    rows = [
        {
            "masks": name,
            "tasks": row["tasks"],
            "mask of one task, MB": one.mask / mega,
            "fine-tuned models, MB": f"{row['finetuning'] / mega:,.1f}",
            "one model and masks, MB": f"{row['masking'] / mega:,.1f}",
            "times smaller": row["ratio"],
        }
        for name, one in found.items()
        for row in one.table(options.tasks)
    ]
    return markdown(rows)


def _dissimilarity(options: argparse.Namespace) -> str:
    first, second = Masks.load(options.first), Masks.load(options.second)
    starts = [Masks.load(path) for path in options.start]
    if len(starts) > 2:
        raise ValueError(f"expected at most two starts, got {len(starts)}.")
    first_start, second_start = [*starts, None, None][:2]
    by = _GROUPS[options.by]
    values, overlap = dissimilarity(first, second, first_start, second_start, by), iou(first, second, by)
    return markdown(
        [{options.by: name, "dissimilarity": value, "IoU of zeros": overlap[name]} for name, value in values.items()]
    )


def _movement(options: argparse.Namespace) -> str:
    return markdown(movement((_step(path), Masks.load(path)) for path in sorted(options.checkpoints, key=_step)))


def _control(options: argparse.Namespace) -> str:
    masks = Masks.load(options.adapter)
    if options.kind == "shuffled":
        made = shuffled(masks, options.seed)
    elif options.base is None:
        raise ValueError(f"'{options.kind}' needs --base, the name or folder of the base model.")
    else:
        made = magnitude_masks(masks, _base(options.base, masks), options.kind == "largest")
    made.save(options.output)
    carry(options.adapter, options.output)
    return f"{options.output}: {made}"


def _base(name: str, masks: Masks) -> nn.Module:
    """The base model under the name that the masks know it by: with a head, the backbone has one of its own."""
    backbone: nn.Module = AutoModel.from_pretrained(name)
    first = next(iter(masks)).partition(".")[0]
    return backbone if hasattr(backbone, first) else nn.ModuleDict({first: backbone})


def _step(path: Path) -> int:
    number = re.search(r"(\d+)$", path.name)
    if number is None:
        raise ValueError(f"the name of '{path}' does not end in a number of steps, as Trainer's checkpoint-500 does.")
    return int(number[1])


def _span(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peft_mask.analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one: Any = commands.add_parser("storage", help="bytes of many tasks, from the shape of a model alone")
    one.add_argument(
        "--model",
        default="bert",
        help="a type of model with its default shape (bert is BERT-base), or a name or folder",
    )
    one.add_argument("--blocks", type=_span, help="blocks that are masked in the paper's way, such as 2-11")
    one.add_argument("--sparsity", type=float, default=DEFAULT_SPARSITY, help="of the masks that are coded")
    one.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 11], metavar="N")
    one.set_defaults(run=_storage)

    one = commands.add_parser("dissimilarity", help="how differently two adapters moved away from their start")
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    one.add_argument(
        "--start",
        type=Path,
        nargs="+",
        default=[],
        help="masks before training, one for both or one each; without: every weight kept",
    )
    one.add_argument("--by", choices=_GROUPS, default="block")
    one.set_defaults(run=_dissimilarity)

    one = commands.add_parser("movement", help="flips and overlap over the checkpoints of a training")
    one.add_argument("checkpoints", type=Path, nargs="+", help="folders checkpoint-N; the lowest N is the start")
    one.set_defaults(run=_movement)

    one = commands.add_parser("control", help="write an adapter with as many zeros in each matrix elsewhere")
    one.add_argument(
        "kind", choices=("shuffled", "magnitude", "largest"), help="at random, the smallest weights, or the largest"
    )
    one.add_argument("adapter", type=Path)
    one.add_argument("output", type=Path)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--base", help="name or folder of the base model, for its weights")
    one.set_defaults(run=_control)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
