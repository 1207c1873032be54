"""`peft-mask combine`: several adapters -> one, by votes on every weight."""

from __future__ import annotations

import argparse
from typing import Any

from peft_mask.cli.adapter import folder_of, read_adapter
from peft_mask.cli.answer import Answer, percent, plain
from peft_mask.cli.base import add_base, base_for_masks, masks_of
from peft_mask.cli.output import check_free, copy_companions, new_folder
from peft_mask.format.masks import Masks
from peft_mask.model.carried import carry

_HOW = ("intersection", "union", "majority")


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "combine",
        help="several adapters into one, by votes on every weight",
        description="Combine masks of one base. A weight is kept by intersection if all adapters keep it, by union if\n"
        "one does, by majority if those with half of the votes do.\n\n"
        "Heads are not combined: numbers of one head mean nothing in another. The result has masks\n"
        "alone, or, with --head A, the head and trained tokens of A as they are.",
        epilog="examples:\n  peft-mask combine runs/a runs/b --how intersection --out runs/both\n"
        "  peft-mask combine runs/a runs/b runs/c --how majority --head runs/a --out runs/most",
    )
    one.add_argument("adapters", metavar="ADAPTER", nargs="+", help="two or more, of one base")
    one.add_argument("--how", choices=_HOW, required=True, help="whose votes keep a weight")
    one.add_argument("--votes", type=float, nargs="+", metavar="N", help="votes of each adapter, for a majority")
    one.add_argument("--head", metavar="A", help="the adapter whose head and tokens the result gets")
    one.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    add_base(one, required=False, why=", for adapters that are not portable")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Combine adapters."""
    check_free(options.out)
    if len(options.adapters) < 2:
        raise ValueError("combine needs two adapters or more.")
    if options.votes is not None and options.how != "majority":
        raise ValueError(f"--votes count in a majority alone, not in {options.how}: leave them out.")
    if options.votes is not None and len(options.votes) != len(options.adapters):
        raise ValueError(
            f"--votes: give a vote for each of the {len(options.adapters)} adapters, in their order; got "
            f"{len(options.votes)}."
        )
    given = [read_adapter(place) for place in options.adapters]
    head = None if options.head is None else folder_of(options.head)
    if head is not None and head.resolve() not in [each.folder.resolve() for each in given]:
        raise ValueError(f"--head {options.head}: name one of the adapters that are combined.")
    base = base_for_masks(options, given[0])
    masks = [masks_of(each, base) for each in given]
    made = Masks.combine(masks, options.votes or [1.0] * len(masks), options.how)
    with new_folder(options.out) as folder:
        made.save(folder)
        carried = carry(head, folder) if head is not None else []
        if head is not None:
            copy_companions(head, folder)
            (folder / "README.md").unlink(missing_ok=True)  # whose figures and results are of the adapter alone
    left = sorted({name for each in given for name in each.beside} - set(carried))
    data = {
        "out": options.out,
        "how": options.how,
        "weights": made.weights,
        "zeros": sum(made.zeros.values()),
        "sparsity": made.sparsity,
        "sparsity_of": {each.name: each.zeros / max(each.weights, 1) for each in given},
        "carried": carried,
        "left_out": left,
    }
    lines = [
        *(f"{plain(each.name)}: {percent(each.zeros / max(each.weights, 1))} off" for each in given),
        f"{plain(options.out)}: {percent(made.sparsity)} off, by {options.how}",
    ]
    if carried:
        lines.append(f"with {', '.join(map(plain, carried))} of {plain(options.head)}")
    elif left:
        lines.append(f"without a head: {', '.join(map(plain, left))} stayed behind (--head ADAPTER takes along one's)")
    return Answer(data, "\n".join(lines))
