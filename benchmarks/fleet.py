"""Hundreds of adapters under Zipf traffic: `AdapterCache` against a switch for each task, and LoRA in the same bytes.

python -m benchmarks.fleet [--adapters 200 1000] [--batches 12] [--rows 16] [--tokens 16] [--dtype float32]
python -m benchmarks.fleet --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.harness import Times, in_turn, report, table
from benchmarks.loaded import OWN, Counts, Loaded, adapter_bytes, add_copies
from benchmarks.mixed import with_tensors_of
from benchmarks.residency import SHAPES, TENSORS, base_model, make_fleet, slot_bytes
from peft_mask import AdapterCache

EXPONENT, SEED = 1.0, 0
SLOTS = 64
SMALL = 1 / 3  # of the bytes of all adapters: the cache that is smaller than what it serves
MOST_LOADED = 2e9  # bytes of LoRA adapters that are kept all at once


@dataclass(frozen=True)
class Batch:
    """Rows of some adapters: a name for each, and token ids, (rows, tokens)."""

    names: list[str]
    ids: Tensor


def traffic(names: Sequence[str], batches: int, rows: int, tokens: int, device: str) -> list[Batch]:
    """Draw batches whose rows ask for the k-th adapter in proportion to 1/k."""
    generator = torch.Generator().manual_seed(SEED)
    popularity = torch.arange(1, len(names) + 1, dtype=torch.float64) ** -EXPONENT
    drawn = [torch.multinomial(popularity, rows, replacement=True, generator=generator) for _ in range(batches)]
    ids = [torch.randint(3, 1000, (rows, tokens), generator=generator).to(device) for _ in range(batches)]
    return [Batch([names[number] for number in own.tolist()], each) for own, each in zip(drawn, ids, strict=True)]


@dataclass
class Way:
    """One way to serve: what it has loaded at the start, and a forward pass of a batch.

    Attributes:
        serve: returns the logits of a batch, (rows, labels).
        counts: returns what was asked for so far.
        held: returns how many adapters are in memory, and what bytes these take.
    """

    serve: Callable[[Batch], Tensor]
    counts: Callable[[], Counts] = Counts
    held: Callable[[], tuple[int, int]] = lambda: (0, 0)
    close: Callable[[], Any] = lambda: None


def base_alone(model: nn.Module) -> Way:
    return Way(lambda batch: model(input_ids=batch.ids).logits)


def cached(model: PeftModel, folder: Path, names: Sequence[str], max_bytes: int) -> Way:
    """An `AdapterCache`, which holds the most popular adapters at the start."""
    cache = AdapterCache(model, folder, max_bytes=max_bytes, slots=min(SLOTS, len(names)))
    size = (folder / names[0] / TENSORS).stat().st_size
    for number, name in reversed(list(enumerate(names[: max_bytes // size]))):
        if number >= SLOTS:  # into memory alone: by a lease each would come into a slot, and leave it again
            read: list[Any] = []
            cache._hold(name, None, read, time.monotonic())
            cache._rooms.release(read)
        else:
            cache.pin(name)
            cache.unpin(name)

    def serve(batch: Batch) -> Tensor:
        with cache.lease(batch.names) as rows:
            logits: Tensor = model(input_ids=batch.ids, adapter_names=rows).logits
            return logits

    def counts() -> Counts:
        stats = cache.stats()
        return Counts(stats.hits, stats.misses, stats.loads)

    def held() -> tuple[int, int]:
        stats = cache.stats()
        return stats.adapters, stats.bytes + sum(slot_bytes(model, f"slot:{slot}") for slot in range(stats.slots))

    return Way(serve, counts, held, cache.close)


def loading(
    model: PeftModel,
    folder_of: Callable[[str], Path],
    names: Sequence[str],
    budget: float,
    rows: int,
    serve: Callable[[PeftModel, Batch], Tensor],
    copies: bool = False,
) -> Way:
    """Adapters that PEFT keeps loaded, as many as fit into a budget of bytes; the most popular ones at the start."""
    size = adapter_bytes(model)
    loaded = Loaded(model, folder_of, min(len(names), max(int(budget // size), rows)))
    first = list(reversed(names[: loaded.capacity]))
    if copies:
        add_copies(model, first)
        loaded.names.update(dict.fromkeys(first))
    else:
        for name in first:
            loaded.bring([name])

    def run(batch: Batch) -> Tensor:
        loaded.bring(batch.names)
        return serve(model, batch)

    return Way(run, lambda: Counts(**vars(loaded.counts)), lambda: (len(loaded.names), size * len(loaded.names)))


def switching(model: PeftModel, batch: Batch) -> Tensor:
    """Compute the rows of each task by a switch and a pass of merged weights."""
    logits: list[Any] = [None] * len(batch.names)
    for name in dict.fromkeys(batch.names):
        own = [row for row, other in enumerate(batch.names) if other == name]
        model.base_model.switch_adapter(name)
        for row, found in zip(own, model(input_ids=batch.ids[own]).logits, strict=True):
            logits[row] = found
    model.unmerge_adapter()  # the next batch may load adapters, which PEFT does into a model that is not merged
    return torch.stack(logits)


def mixing(model: PeftModel, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch.ids, adapter_names=batch.names).logits
    return logits


def lora_config() -> LoraConfig:
    return LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)


def make_loras(folder: Path, shape: str, dtype: torch.dtype, count: int) -> Callable[[str], Path]:
    """Write some LoRA adapters, r=8 on every linear layer, and return where each name finds one of them."""
    for number in range(count):
        torch.manual_seed(number)
        model = get_peft_model(base_model(shape, dtype), lora_config(), autocast_adapter_dtype=False)
        model.to(dtype).save_pretrained(str(folder / f"lora-{number}"))
    return lambda name: folder / f"lora-{int(name.rpartition('-')[2]) % count}"


def ways(
    plain: nn.Module, make: Callable[[], nn.Module], folder: Path, names: list[str], loras: Any, rows: int
) -> tuple[dict[str, Way], dict[str, int]]:
    """Return the ways, and what one adapter takes in memory in each kind."""

    def masks(*, shared: bool = True) -> PeftModel:
        model = PeftModel.from_pretrained(make(), str(folder / names[0]), adapter_name=OWN).eval()
        return with_tensors_of(model, plain) if shared else model

    def lora() -> PeftModel:
        model = PeftModel.from_pretrained(make(), str(loras(names[0])), adapter_name=OWN, autocast_adapter_dtype=False)
        return with_tensors_of(model.eval(), plain)

    files = [(folder / name / TENSORS).stat().st_size for name in names]
    coded, least = sum(files), (rows + 1) * max(files)  # what one lease may need
    found = {
        "base alone": base_alone(plain),
        "AdapterCache, all adapters in memory": cached(masks(), folder, names, 2 * coded),
        "AdapterCache, a third of these bytes": cached(masks(), folder, names, max(int(SMALL * coded), least)),
    }
    budget = found["AdapterCache, all adapters in memory"].held()[1]
    own, low = masks(shared=False), lora()  # zeros are written into the first one's weights
    sizes = {"mask, loaded by PEFT": adapter_bytes(own), "LoRA r=8": adapter_bytes(low)}
    found["switch for each task, masks in the same bytes"] = loading(
        own, lambda name: folder / name, names, budget, rows, switching
    )
    found["LoRA r=8 mixed, in the same bytes"] = loading(low, loras, names, budget, rows, mixing, copies=True)
    if budget < len(names) * sizes["LoRA r=8"] <= MOST_LOADED:
        found["LoRA r=8 mixed, all loaded"] = loading(lora(), loras, names, MOST_LOADED, rows, mixing, copies=True)
    return found, sizes


def check_agreement(found: dict[str, Way], batch: Batch) -> None:
    """Assert that all ways to serve masks answer the same, and that adapters do not."""
    masks = {name: way.serve(batch) for name, way in found.items() if "Cache" in name or "masks" in name}
    first, *others = masks.values()
    far = (first - found["base alone"].serve(batch)).abs().mean()
    assert all((first - other).abs().mean() < 0.1 * far for other in others)
    for name, way in found.items():
        if name not in masks:
            way.serve(batch)


@torch.inference_mode()
def measure(found: dict[str, Way], batches: Sequence[Batch], device: str) -> dict[str, Any]:
    check_agreement(found, batches[0])
    before = {name: way.counts() for name, way in found.items()}
    clock = time.perf_counter if device != "cpu" else time.process_time
    waiting = {name: iter(batches[1:]) for name in found}
    variants = {name: lambda name=name: found[name].serve(next(waiting[name])) for name in found}
    times = in_turn(variants, len(batches) - 1, warmup=0, clock=clock, device=device)
    rows = sum(len(batch.names) for batch in batches[1:])
    return {name: figures_of(way, times[name], times["base alone"], before[name], rows) for name, way in found.items()}


def figures_of(way: Way, times: Times, base: Times, before: Counts, rows: int) -> dict[str, Any]:
    now = way.counts()
    seconds = times.seconds
    adapters, held = way.held()
    return {
        "adapters in memory": adapters,
        "bytes": held,
        **{key: value - getattr(before, key) for key, value in vars(now).items()},
        "rows a second": rows / sum(seconds),
        "p50": statistics.median(seconds),
        "p95": statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        "of the base": times.ratio(base),
        "seconds": times.seconds,
    }


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            *(f"{each['adapters in memory']}", f"{each['bytes'] / 1e6:.0f}"),
            *(f"{each[key]}" for key in ("hits", "misses", "reads")),
            f"{each['rows a second']:.1f}",
            *(f"{1e3 * each[key]:.0f}" for key in ("p50", "p95")),
            "{:.2f} ({:.2f}-{:.2f})".format(*each["of the base"]),
        ]
        for name, each in figures.items()
    ]


HEADER = (
    *("", "adapters in memory", "MB", "hits", "misses", "read from disk"),
    *("rows a second", "p50, ms", "p95, ms", "of the base (min-max)"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", type=int, default=[200, 1000])
    parser.add_argument("--masks", type=int, default=8, help="how many of them have masks of their own")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="BERT-base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT, of transformers
    dtype = getattr(torch, args.dtype)
    parts, figures = [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = make_fleet(folder, args.shape, dtype, max(args.adapters), args.masks)
        loras = make_loras(folder, args.shape, dtype, args.masks)

        def make() -> nn.Module:
            return base_model(args.shape, dtype).to(args.device)

        for count in args.adapters:
            found, sizes = ways(make(), make, folder, names[:count], loras, args.rows)
            batches = traffic(names[:count], args.batches + 1, args.rows, args.tokens, args.device)
            own = measure(found, batches, args.device)
            for way in found.values():
                way.close()
            tasks = statistics.mean(len(set(batch.names)) for batch in batches[1:])
            each = ", ".join(
                f"{name} {size / 1e6:.2f} MB (all of them {count * size / 1e9:.2f} GB)" for name, size in sizes.items()
            )
            parts.append(
                f"## {count} adapters\n\n{tasks:.1f} tasks a batch. Beside the cache, one adapter takes: {each}.\n\n"
                f"{table(HEADER, rows_of(own))}"
            )
            print(parts[-1], flush=True)
            figures[count] = {"sizes": sizes, "tasks a batch": tasks, "ways": own}
    body = about(args) + "\n\n" + "\n\n".join(parts)
    name = "fleet" if args.dtype == "float32" else f"fleet-{args.dtype}"
    report(name, "A fleet under Zipf traffic", body, figures, args.results, args.device)


def about(args: argparse.Namespace) -> str:
    clock = "processor time" if args.device == "cpu" else "time"
    return (
        f"{args.batches} batches of {args.rows} rows of {args.tokens} tokens, each row of an adapter drawn in "
        f"proportion to 1/k^{EXPONENT:g} (seed {SEED}); {args.shape} in {args.dtype}, random weights, {args.masks} "
        "different random masks of the default's kind (0.5 % zeros among the largest tenth), heads of 3 labels. All "
        "ways serve the same batches in turn, and hold the most popular adapters at the start. Figures are of "
        f"{clock}, with what misses cost. A hit is an adapter that can be computed with at once: in one of {SLOTS} "
        "slots of the cache, or loaded by PEFT. Bytes of a cache are those of coded adapters with their heads, and of "
        "slots in use; of adapters loaded by PEFT those of their tensors. `switch for each task` sorts a batch by "
        "task, and computes each group with merged weights after `switch_adapter`. Where PEFT has no room for all, "
        "the least recently used adapter is deleted for one that is loaded, from files in the page cache. Before "
        "timing, all ways to serve masks agreed."
    )


if __name__ == "__main__":
    main()
