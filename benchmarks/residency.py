"""What adapters take that an `AdapterCache` holds, in memory and in the model, and what it costs to bring one in.

python -m benchmarks.residency [--adapters 1000] [--masks 20] [--rounds 9] [--shape BERT-base] [--dtype float32]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness import in_turn, report, table
from peft_mask import AdapterCache, MaskConfig, MaskLayer

SHAPES: dict[str, dict[str, Any]] = {
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base_model(shape: str, dtype: torch.dtype) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape], vocab_size=1000, num_labels=3)).to(dtype).eval()


def make_fleet(folder: Path, shape: str, dtype: torch.dtype, adapters: int, masks: int) -> list[str]:
    """Write adapters with the default's random masks, `masks` of them different, and a head each."""
    names = [f"task-{number}" for number in range(adapters)]
    for number, name in enumerate(names):
        if number < masks:
            config = MaskConfig(task_type="SEQ_CLS", seed=number, init_weights=False)
            get_peft_model(base_model(shape, dtype), config).save_pretrained(str(folder / name))
        else:
            (folder / name).mkdir()
            tensors = load_file(folder / names[number % masks] / TENSORS)
            head = next(key for key in tensors if key.endswith("classifier.weight"))
            tensors[head] = torch.randn(tensors[head].shape, generator=torch.Generator().manual_seed(number)).to(dtype)
            save_file(tensors, folder / name / TENSORS)
            text = (folder / names[number % masks] / CONFIG).read_text("utf-8")
            said = MaskConfig.from_pretrained(str(folder / names[number % masks]))
            assert said.checksums is not None
            (folder / name / CONFIG).write_text(text.replace(said.checksums["records"], "00000000"), "utf-8")
    return names


def resident_bytes() -> int:
    """What the process has in memory, as Linux counts it."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def slot_bytes(model: PeftModel, slot: str) -> int:
    """What a slot in use takes beside its adapter's bytes and its head: what was gathered of the records."""
    layers = [module for module in model.modules() if isinstance(module, MaskLayer)]
    held = [zeros for layer in layers if (zeros := layer.known_zeros.held(slot)) is not None]
    return sum(
        tensor.nbytes for zeros in held for tensor in (zeros.pointers, zeros.columns, zeros.values, zeros.places)
    )


def weights_of(model: PeftModel) -> int:
    return sum(module.mask_shape.numel() for module in model.modules() if isinstance(module, MaskLayer))


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--masks", type=int, default=20, help="how many of them have masks of their own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="BERT-base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as place:
        making = [Path(place), options.shape, dtype, options.adapters, options.masks]
        with get_context("spawn").Pool(1) as pool:  # what it leaves in memory would hide how this process grows
            names = pool.apply(make_fleet, making)
        model = PeftModel.from_pretrained(base_model(options.shape, dtype), str(Path(place) / names[0])).eval()
        figures = measure(model, Path(place), names, options.slots, options.rounds)
    about = {"shape": options.shape, "dtype": options.dtype, "masks": min(options.masks, options.adapters)}
    figures = about | figures
    report(f"residency-{options.dtype}", "Adapters in memory", tables(figures), figures, folder)


def measure(model: PeftModel, folder: Path, names: Sequence[str], slots: int, rounds: int) -> dict[str, Any]:
    weights = weights_of(model)
    cache = AdapterCache(model, folder, max_bytes="4GB", slots=slots)
    before = resident_bytes()
    with cache.lease(names[:slots]):
        pass
    with_slots = resident_bytes()
    for name in names[slots:]:
        with cache.lease([name]):
            pass
    after = resident_bytes()
    stats = cache.stats()
    assert stats.adapters == len(names)
    with cache.lease(names[:1]) as rows:
        in_slot = slot_bytes(model, rows[0])
    figures: dict[str, Any] = {
        "adapters": stats.adapters,
        "weights": weights,
        "coded bytes": stats.bytes,
        "growth, first slots": with_slots - before,
        "growth": after - before,
        "slots": slots,
        "slot bytes": in_slot,
    }
    cache.close()
    few = AdapterCache(model, folder, max_bytes="4GB", slots=slots)
    own = list(names[:slots])
    others = itertools.cycle(names[slots : 2 * slots])
    for name in names[: 2 * slots]:
        with few.lease([name]):
            pass
    ids = torch.arange(slots).view(slots, 1) + 3
    with torch.no_grad():
        times = in_turn(variants(few, model, own, others, ids), rounds, warmup=2, clock=time.process_time)
    call = times["decode call of the base"]
    figures["times"] = {
        name: {"milliseconds": 1e3 * each.median, "of a call": each.ratio(call)} for name, each in times.items()
    }
    few.close()
    return figures


def variants(
    cache: AdapterCache, model: PeftModel, own: list[str], others: Any, ids: Tensor
) -> dict[str, Callable[[], Any]]:
    def lease(names: list[str]) -> None:
        with cache.lease(names):
            pass

    def mixed() -> None:
        with cache.lease(own) as rows:
            model(input_ids=ids, adapter_names=rows)

    def base() -> None:
        with model.disable_adapter():
            model(input_ids=ids)

    def miss() -> None:
        before = cache.stats()
        lease([next(others)])
        after = cache.stats()
        assert (after.fills - before.fills, after.loads - before.loads) == (1, 0)

    def cold() -> None:
        name = next(others)
        cache.evict(name)
        lease([name])

    return {
        "decode call of the base": base,
        f"lease of {len(own)} adapters, some to be filled again": lambda: lease(own),
        f"lease of {len(own)} adapters that are in slots": lambda: lease(own),
        f"that lease, and a decode call of {len(own)} rows": mixed,
        "miss from memory: an adapter comes into a slot": miss,
        "miss from disk: it is read and checked as well": cold,
    }


def tables(figures: dict[str, Any]) -> str:
    weights, count = figures["weights"], figures["adapters"]
    sizes = [
        (
            "coded in memory, with the head",
            f"{8 * figures['coded bytes'] / count / weights:.3f}",
            figures["coded bytes"] / count,
        ),
        ("in a slot besides, without the head", f"{8 * figures['slot bytes'] / weights:.3f}", figures["slot bytes"]),
    ]
    rows = [(name, bits, f"{size / 1e6:.3f}") for name, bits, size in sizes]
    parts = [
        f"{count} adapters of {figures['shape']} in {figures['dtype']}, {weights:,} masked weights, "
        f"{figures['masks']} different masks, {figures['slots']} slots.",
        table(("an adapter", "bits a weight", "MB"), rows),
        table(
            ("all of them", "GB"),
            [
                ("coded bytes and heads, as the cache counts them", f"{figures['coded bytes'] / 1e9:.3f}"),
                ("the process has grown by, slots included", f"{figures['growth'] / 1e9:.3f}"),
                (
                    f"of that by the first {figures['slots']}, with their slots",
                    f"{figures['growth, first slots'] / 1e9:.3f}",
                ),
            ],
        ),
        table(
            ("what", "ms of processor time", "of a decode call of the base"),
            [
                (name, f"{each['milliseconds']:.2f}", "{:.2f} ({:.2f} to {:.2f})".format(*each["of a call"]))
                for name, each in figures["times"].items()
            ],
        ),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
