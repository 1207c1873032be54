"""What grows, and how: models of many layers, one very large matrix, many adapters of one base.

python -m benchmarks.large [--parts layers matrix adapters]
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from attacks.doors import Peak
from benchmarks.harness import in_turn, report, table
from benchmarks.switch import copier
from peft_mask import MaskConfig, MaskLayer, Masks
from peft_mask.format.packing import bits_from_positions, pack_bits, unpack_bits

BLOCKS = (42, 83, 167)  # of BERT: 253, 499 and 1,003 masked layers
MATRIX = (65536, 8192)
LOADED = (1, 10, 50, 100, 200)
SPARSITY = 0.005


def bert(blocks: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    heads = max(1, width // 64)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return BertModel(BertConfig(num_hidden_layers=blocks, **shape)).eval()


def random_adapter(model: nn.Module, folder: Path, seed: int = 0) -> Path:
    """Save random masks of a model: half a per cent of the weights off, among the largest tenth."""
    config = MaskConfig(init_weights=False, seed=seed, target_sparsity=SPARSITY)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(str(folder))
    return folder


def masked_layers(model: nn.Module) -> list[MaskLayer]:
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


# ---- many layers ----


def steps_of_an_adapter(blocks: int, folder: Path, width: int = 16) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done with adapters of one model, by name: each step is to be run before the next is taken."""
    base = bert(blocks, width)
    bases = [copy.deepcopy(base) for _ in range(2)]
    made: dict[str, Any] = {}
    config = MaskConfig(init_weights=False, seed=0)

    def run(name: str, step: Callable[[], Any]) -> Callable[[], None]:
        return lambda: made.update({name: step()})

    yield "inject", run("trained", lambda: get_peft_model(bases[0], config))
    yield "save", lambda: made["trained"].save_pretrained(str(folder))
    yield "load", run("served", lambda: PeftModel.from_pretrained(bases[1], str(folder)))
    yield "load another", lambda: made["served"].load_adapter(str(folder), "other")
    made["served"].base_model.switch_adapter("default")
    yield "switch", lambda: made["served"].base_model.switch_adapter("other")
    yield "read as a value", lambda: Masks.load(folder)


def layers(rounds: int) -> tuple[str, Any]:
    seconds: dict[str, dict[int, list[float]]] = {}
    counts = {}
    with tempfile.TemporaryDirectory() as top:
        for number in range(rounds + 1):
            for blocks in BLOCKS:
                counts[blocks] = 6 * blocks + 1
                for name, step in steps_of_an_adapter(blocks, Path(top) / f"{number}-{blocks}"):
                    gc.collect()
                    began = time.process_time()
                    step()
                    if number:  # the first round warms up
                        seconds.setdefault(name, {}).setdefault(blocks, []).append(time.process_time() - began)
    rows = []
    for name, times in seconds.items():
        each = [min(times[blocks]) / counts[blocks] for blocks in BLOCKS]
        rows.append((name, f"{1e3 * each[0]:.2f}", *(f"{value / each[0]:.2f}" for value in each)))
    header = ("", f"ms a layer, of {counts[BLOCKS[0]]}", *(f"{counts[blocks]:,}" for blocks in BLOCKS))
    body = (
        f"BERT of width 16 with {BLOCKS[0]}, {BLOCKS[1]} and {BLOCKS[2]} blocks, every linear layer masked. Processor "
        f"time of a layer, the least of {rounds} rounds, and its ratio to that in the smallest model: 1 if time grows "
        "with the number of layers, 4 in the last column if it grows with its square.\n\n" + table(header, rows)
    )
    return body, seconds


# ---- a large matrix ----


def matrix(shape: tuple[int, int] = MATRIX) -> tuple[str, Any]:
    numel = math.prod(shape)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for chunk in weight.split(1024):
        chunk.normal_()
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    model[0].in_features, model[0].out_features = shape[1], shape[0]
    large = torch.randint(numel, (int(12 * SPARSITY * numel),))
    large = large[weight.view(-1)[large].abs() > 1.645].unique()  # of the largest tenth of normal weights
    bits = bits_from_positions(large[torch.randperm(len(large))[: int(SPARSITY * numel)]], shape, kept=False)
    del large
    peaks: dict[str, int] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        gc.collect()
        with Peak() as peak:
            yield
        peaks[name] = peak.bytes
        print(f"{name}: {peak.bytes / numel:.2f} bytes a weight", flush=True)

    with tempfile.TemporaryDirectory() as top:
        mask = unpack_bits(bits, shape)
        with measured("packed, beside the mask in bools"):
            packed = pack_bits(mask)
        assert torch.equal(packed, bits)
        with measured("made a value of, beside the mask in bools"):
            masks = Masks({"0": mask})
        del mask, packed
        with measured("coded and saved"):
            masks.save(f"{top}/portable")
        with measured("coded and saved, against the base"):
            masks.save(f"{top}/against", base=model)
        del masks
        with measured("read as a value"):
            read = Masks.load(f"{top}/portable", base=model)
        assert torch.equal(read._masks["0"].bits, bits)
        del read
        with measured("read as a value, against the base"):
            read = Masks.load(f"{top}/against", base=model)
        assert torch.equal(read._masks["0"].bits, bits)
        del read
        with measured("loaded into the model"):
            served = PeftModel.from_pretrained(model, f"{top}/portable")
        assert torch.equal(served.base_model.model[0].peft_mask_bits["default"], bits)
        with measured("loaded beside it, against the base"):
            served.load_adapter(f"{top}/against", "against")
        with measured("switched to (merged)"):
            served.base_model.switch_adapter("against")
        with measured("switched from"):
            served.base_model.switch_adapter("default")
        with measured("saved while merged"):
            served.save_pretrained(f"{top}/again", selected_adapters=["default"])
        served.unmerge_adapter()
        with measured("saved"):
            served.save_pretrained(f"{top}/again", selected_adapters=["default"])
        size = Path(f"{top}/again/adapter_model.safetensors").stat().st_size
    own = weight.nbytes + bits.nbytes
    rows = [
        (name, f"{peak / 2**20:,.0f}", f"{peak / numel:.2f}", f"{1 + peak / own:.2f}") for name, peak in peaks.items()
    ]
    body = (
        f"One matrix of {shape[0]:,} x {shape[1]:,} weights in bfloat16, {weight.nbytes / 2**20:,.0f} MiB, and a mask "
        f"of it with {100 * SPARSITY:g} % zeros, {bits.nbytes / 2**20:,.0f} MiB of bits, {size / 1e6:.1f} MB in its "
        "file. The most memory that a step takes beyond what was there before it, by the kernel's count, and the whole "
        "as a multiple of the matrix with one mask. Saving while merged undoes the merge in a copy, of one matrix at a "
        "time.\n\n" + table(("", "MiB", "bytes a weight", "x own memory"), rows)
    )
    return body, {"shape": shape, "peaks": peaks, "own": own, "file": size}


# ---- many adapters ----


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and not given back would hide what is taken next
    with Peak() as peak:
        pass
    assert peak._before is not None, "this needs Linux's count of resident memory"
    return peak._before


def adapters(rounds: int, loaded: Sequence[int] = LOADED, model: nn.Module | None = None) -> tuple[str, Any]:
    base = bert(12, 768) if model is None else model
    figures = []
    with tempfile.TemporaryDirectory() as top:
        folders = [str(random_adapter(base, Path(top) / f"{seed}", seed)) for seed in range(2)]
        before = resident()
        served = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        copy_weights = None
        seconds = 0.0
        for number in range(1, loaded[-1] + 1):
            if number > 1:
                print(f"loading adapter {number}", end="\r", flush=True)
                began = time.process_time()
                served.load_adapter(folders[number % 2], str(number - 1))
                seconds = time.process_time() - began
            if number not in loaded:
                continue
            taken = resident() - before
            names = ["0", str(number - 1)]

            def switch(names: list[str] = names) -> None:
                names.reverse()
                served.base_model.switch_adapter(names[0])

            if number == 1:
                served.load_adapter(folders[1], "second")  # to switch to, and gone again before more are counted
                names[1] = "second"
            copy_weights = copier(served)
            times = in_turn({"switch": switch, "copy": copy_weights}, rounds, warmup=2, clock=time.process_time)
            served.unmerge_adapter()
            served.set_adapter("0")
            if number == 1:
                served.delete_adapter("second")
            del copy_weights
            figures.append(
                {
                    "adapters": number,
                    "resident": taken,
                    "load_seconds": seconds,
                    "switch": times["switch"].seconds,
                    "copy": times["copy"].seconds,
                    "ratio": times["switch"].ratio(times["copy"]),
                }
            )
    weights = sum(layer.mask_shape.numel() for layer in masked_layers(served))
    rows = []
    for row in figures:
        bits = row["adapters"] * weights / 8
        ratio = row["ratio"]
        rows.append(
            (
                row["adapters"],
                f"{bits / 1e6:,.1f}",
                f"{row['resident'] / 1e6:,.1f} ({row['resident'] / bits:.2f})",
                f"{row['load_seconds']:.2f}" if row["load_seconds"] else "-",
                f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})",
            )
        )
    header = ("adapters", "bits, MB", "resident, MB (x bits)", "loading the last, s", "switch, x copy (min-max)")
    body = (
        f"BERT-base, {weights:,} masked weights in float32, random masks of {100 * SPARSITY:g} % zeros. Resident "
        "memory is the kernel's count, beyond that of the base. A switch is from the first adapter to the last or "
        f"back, in turn with a copy of all masked weights, {rounds} rounds, processor time.\n\n" + table(header, rows)
    )
    return body, figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"layers": layers, "matrix": matrix, "adapters": adapters}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    made = {
        name: part() if name == "matrix" else part(options.rounds)  # type: ignore[operator]
        for name, part in parts.items()
        if name in options.parts
    }
    titles = {"layers": "Many layers", "matrix": "A large matrix", "adapters": "Many adapters"}
    for name, (body, figures) in made.items():
        report(f"large-{name}", titles[name], body, figures)


if __name__ == "__main__":
    main()
