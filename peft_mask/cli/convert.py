"""`peft-mask convert`: an adapter that needs its base to be read -> a portable one, and back."""

from __future__ import annotations

import argparse
from typing import Any

from peft_mask.cli.adapter import read_adapter
from peft_mask.cli.answer import Answer, plain
from peft_mask.cli.base import add_base, base_for_masks, masks_of
from peft_mask.cli.output import check_free, copy_companions, new_folder
from peft_mask.model.carried import carry
from peft_mask.settings.card import is_card_due, update_model_card


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "convert",
        help="a portable file, or a smaller one that needs its base",
        description="Write an adapter anew, with the same masks, coded otherwise. A portable file is read by itself,\n"
        "onto the base in any dtype. One against its base is about a third smaller, and read with\n"
        "that base in float32 or bfloat16 alone. Heads, tokens, labels and card come along.",
        epilog="examples:\n  peft-mask convert runs/trec --against bert-base-uncased --out runs/small\n"
        "  peft-mask convert runs/small --portable --base bert-base-uncased --out runs/trec",
    )
    one.add_argument("adapter", metavar="ADAPTER", help="a folder, or an id on the Hub")
    way = one.add_mutually_exclusive_group(required=True)
    way.add_argument("--portable", action="store_true", help="read without the base")
    way.add_argument("--against", metavar="BASE", help="coded against this base: a folder, or an id on the Hub")
    one.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    add_base(one, required=False, why=", to read an adapter that is not portable")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Convert an adapter."""
    check_free(options.out)
    adapter = read_adapter(options.adapter)
    if options.against is not None:
        if options.base not in (None, options.against):
            raise ValueError("--against names the base already: leave --base out.")
        options.base = options.against
    base = base_for_masks(options, adapter)
    masks = masks_of(adapter, base)
    with new_folder(options.out) as folder:
        masks.save(folder, base if options.against is not None else None)
        carry(adapter.folder, folder)
        copy_companions(adapter.folder, folder)
        if is_card_due(folder):
            update_model_card(folder)
    made = read_adapter(options.out)
    data = {
        "out": options.out,
        "portable": made.portable,
        "bytes_before": adapter.file_bytes,
        "bytes": made.file_bytes,
        "mask_bytes_before": adapter.mask_bytes,
        "mask_bytes": made.mask_bytes,
    }
    kind = "portable" if made.portable else "needs its base"
    text = f"{plain(options.out)}: {kind}; masks {adapter.mask_bytes:,} -> {made.mask_bytes:,} bytes"
    if options.against is not None and made.portable:
        text += "\nNo mask is shorter against its base, so the file needs none."
    return Answer(data, f"{text}, file {made.file_bytes:,} bytes" if "\n" not in text else text)
