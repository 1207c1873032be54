"""`peft-mask report`: adapters -> one page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_mask import __version__
from peft_mask.cli.adapter import Adapter, read_adapter
from peft_mask.cli.answer import Answer, plain, size
from peft_mask.cli.base import add_base, load_base
from peft_mask.format.atomic import replace_files
from peft_mask.format.masks import Masks


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "report",
        help="one HTML page about adapters, with charts (needs [report])",
        description="Write one HTML page: how much is off in each layer and matrix, and where; how adapters\n"
        "agree; what takes the bytes; training curves and card, if they lie beside the adapter. The\n"
        "page loads nothing and runs nothing. It needs pip install 'peft-mask[report]'.",
        epilog="examples:\n  peft-mask report runs/trec --out report.html\n"
        "  peft-mask report runs/trec runs/sst2 --base bert-base-uncased --out report.html",
    )
    one.add_argument("adapters", metavar="ADAPTER", nargs="+", help="folders, or ids on the Hub")
    one.add_argument("--out", required=True, metavar="FILE", help="the page; a file of that name is replaced")
    one.add_argument("--title", default="Masks", help="of the page")
    add_base(one, required=False, why=", to show zeros by the magnitude of their weights")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Write a report."""
    from peft_mask.cli import sections
    from peft_mask.cli.page import page

    target = Path(options.out)
    if target.is_dir():
        raise ValueError(f"--out {options.out}: this is a folder, name a file such as report.html.")
    adapters = named([read_adapter(place) for place in options.adapters])
    base = None
    if options.base is not None:
        base, _ = load_base(options.base, next(iter(adapters.values())), options.dtype)
    readable = {name: each for name, each in adapters.items() if each.portable or base is not None}
    masks = {name: Masks.load(each.folder, base) for name, each in readable.items()}
    parts = [sections.sparsity(adapters), sections.where(adapters, masks, base)]
    if len(masks) > 1:
        parts.append(sections.agreement(masks))
    parts.append(sections.coding(adapters, masks))
    parts += [part for part in (sections.training(adapters), sections.cards(adapters)) if part is not None]
    html = page(options.title, sections.facts_of(adapters), parts, __version__)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_files({target: html.encode("utf-8")})
    data = {
        "out": options.out,
        "bytes": target.stat().st_size,
        "adapters": {name: each.name for name, each in adapters.items()},
        "sections": [part.id for part in parts],
    }
    shown = ", ".join(part.title.lower() for part in parts)
    return Answer(data, f"{plain(options.out)}: {size(target.stat().st_size)}, with {shown}")


def named(adapters: list[Adapter]) -> dict[str, Adapter]:
    """Return adapters by what a page calls them: the name of the folder, with those above where that is not enough."""
    places = [Path(each.name).parts or (each.name,) for each in adapters]
    found: dict[str, Adapter] = {}
    for adapter, parts in zip(adapters, places, strict=True):
        ends = [parts[-length:] for length in range(1, len(parts) + 1)]
        fitting = [end for end in ends if sum(other[-len(end) :] == end for other in places) == 1]
        name = plain("/".join(fitting[0] if fitting else parts))
        if name in found:
            raise ValueError(f"'{adapter.name}' is given twice: name each adapter once.")
        found[name] = adapter
    return found
