"""What the sparse correction of a batch gives a GPU to do: launches and bytes, by bags and by Triton's kernel.

python -m benchmarks.correction

A count and no measurement, of one layer of a Llama-2-7B, one token a row: nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import report, table
from benchmarks.launches import SECTOR, Counted
from peft_mask.layers.correction import Zeros, correct

WIDTH, INNER = 4096, 11008
MATRICES = 4 * [(WIDTH, WIDTH)] + 2 * [(INNER, WIDTH)] + [(WIDTH, INNER)]  # q, k, v, o; gate, up; down: (out, in)
SPARSITY = 0.005
DTYPE = torch.bfloat16
ROW_OF_TABLE = 6 * 8  # bytes: what a program of the Triton kernel has to know of its adapter and its tokens


def zeros_without_values(shape: tuple[int, int]) -> Zeros:
    out, width = shape
    zeros = round(SPARSITY * out * width)
    return Zeros(
        pointers=torch.empty(out + 1, dtype=torch.int32, device="meta"),
        columns=torch.empty(zeros, dtype=torch.int32, device="meta"),
        values=torch.empty(zeros, dtype=DTYPE, device="meta"),
        places=torch.empty(out, dtype=torch.int32, device="meta"),
    )


def by_bags(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> tuple[int, float]:
    """Launches and bytes, as the operations are seen on their way to the device."""
    with Counted() as counted:
        correct(x, sizes, zeros)
    return sum(counted.launches.values()), sum(counted.bytes.values())


def by_triton(x: Tensor, sizes: Sequence[int], zeros: Sequence[Zeros]) -> tuple[int, float]:
    """Launches and bytes of the kernel for a token each, and of the copy that sends its table.

    It reads its tensors once. Of `x`, as of what bags look up, the first reading counts; the others find it in a cache.
    """
    read = sum(getattr(own, field.name).nbytes for own in zeros for field in fields(Zeros))
    written = len(sizes) * len(zeros[0].places) * x.element_size()
    return 2, read + x.nbytes + written + 2 * len(sizes) * ROW_OF_TABLE


def of_a_layer(tasks: int, way: Callable[..., tuple[int, float]]) -> tuple[int, float]:
    counts = [
        way(
            torch.empty(tasks, shape[1], dtype=DTYPE, device="meta"), tasks * [1], tasks * [zeros_without_values(shape)]
        )
        for shape in MATRICES
    ]
    return sum(launches for launches, _ in counts), sum(moved for _, moved in counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    weights = sum(out * width for out, width in MATRICES) * DTYPE.itemsize
    rows, figures = [], {}
    for tasks in args.tasks:
        gathered = tasks * SPARSITY * weights / DTYPE.itemsize * SECTOR
        for name, way in {"embedding bags": by_bags, "Triton": by_triton}.items():
            launches, moved = of_a_layer(tasks, way)
            figures[f"{name}/{tasks}"] = {"launches": launches, "bytes": moved, "gathered": gathered}
            rows.append(
                (tasks, name, launches, f"{moved / 1e6:.1f}", f"{moved / weights:.3f}", f"{gathered / 1e6:.0f}")
            )
    body = (
        f"One layer of a Llama-2-7B: {len(MATRICES)} products of {weights / 1e6:.0f} MB in bfloat16, a token of each "
        f"adapter, {100 * SPARSITY:g} % zeros. Counted, not measured: no GPU has run it. Launches include the copy "
        "that sends the Triton kernel its table. Bytes are what is read and written, each tensor once an operation, "
        "and `of the weights` is their share of what the products read. Inputs are gathered on top of that: for each "
        "weight that is off a sector of 32 bytes at most, from caches, as the input itself is small.\n\n"
    )
    header = ("adapters", "by", "launches", "MB", "of the weights", "MB gathered from caches")
    report(
        "correction", "What the sparse correction gives a GPU to do", body + table(header, rows), figures, args.results
    )


if __name__ == "__main__":
    main()
