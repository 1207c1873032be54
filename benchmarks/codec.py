"""Bytes of a mask against its entropy and against LoRA, and the time to encode, decode and load.

python -m benchmarks.codec [--data FOLDER --tasks trec ud_ewt_pos] [--rounds 15]

With `--data`, masks are first trained by the default recipe on tasks of `benchmarks/accuracy`, a few minutes each.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks.accuracy.__main__ import minilm
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Setting, train, untrained
from benchmarks.harness import in_turn, report, table
from benchmarks.switch import base_model
from peft_mask import MaskConfig, MaskLayer
from peft_mask.format.fingerprint import fingerprint_of
from peft_mask.format.packing import entropy_bits, pack_bits
from peft_mask.format.record import read_record, write_record

SPARSITIES = (0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 0.5)
FILE = "adapter_model.safetensors"


def masks_of(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The masks of a model, and the weights they are for."""
    layers = [module for module in model.modules() if isinstance(module, MaskLayer)]
    return [layer.mask("default") for layer in layers], [layer.unmerged_weight() for layer in layers]


def random_masks(sparsity: float, **fields: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks without any order, by default with zeros among all weights."""
    torch.manual_seed(0)
    anywhere = {"binarizer": "threshold", "candidates": None, "init_sparsity": sparsity}
    return masks_of(get_peft_model(base_model(), MaskConfig(init_weights=False, **(fields or anywhere))))


def trained_masks(name: str, data: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks of the default recipe after the budget of a task of `benchmarks/accuracy`, seed 0."""
    task, method, setting = TASKS[name], METHODS["mask"], Setting(data, minilm(), progress=print)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.safetensors"
        train(task, method, method.lrs[0], 0, task.steps, setting, state)
        model = untrained(task, method, 0, setting)
        with torch.no_grad():
            for key, values in load_file(state).items():
                model.get_parameter(key).copy_(values)
    return masks_of(model)


def coding_row(
    label: str, masks: Sequence[torch.Tensor], rounds: int, bases: Sequence[torch.Tensor] | None = None
) -> tuple[tuple[str, ...], dict[str, object]]:
    """Code masks by themselves or, with `bases`, against these weights."""
    fingerprint = fingerprint_of(torch.ones(1))
    packed = [
        (pack_bits(mask), mask.shape, base) for mask, base in zip(masks, bases or [None] * len(masks), strict=True)
    ]
    records = [write_record(bits, shape, fingerprint, base) for bits, shape, base in packed]
    assert all(torch.equal(read_record(r, s, w).bits, b) for r, (b, s, w) in zip(records, packed, strict=True))
    times = in_turn(
        {
            "encode": lambda: [write_record(bits, shape, fingerprint, base) for bits, shape, base in packed],
            "decode": lambda: [read_record(r, s, w) for r, (_, s, w) in zip(records, packed, strict=True)],
        },
        rounds,
        clock=process_time,
    )
    weights = sum(mask.numel() for mask in masks)
    zeros = sum(int((~mask).sum()) for mask in masks)
    size = sum(map(len, records))
    bound = sum(entropy_bits(int((~mask).sum()), mask.numel()) for mask in masks) / 8
    per_10m = {name: time.median * 1e7 / weights for name, time in times.items()}
    row = (
        label,
        f"the base, {str(bases[0].dtype).removeprefix('torch.')}" if bases else "-",
        f"{100 * zeros / weights:.2f} %",
        f"{size:,}",
        f"{8 * size / weights:.3f}",
        f"{size / bound:.3f}",
        f"{1e3 * per_10m['encode']:.0f}",
        f"{1e3 * per_10m['decode']:.0f}",
    )
    figures = {"bytes": size, "entropy_bytes": bound, "weights": weights, "zeros": zeros, "seconds_per_10M": per_10m}
    return row, figures


def cases(tasks: Sequence[str], data: Path | None) -> Iterator[tuple[str, list[torch.Tensor], list[torch.Tensor]]]:
    """What is coded both ways: trained masks, and random ones whose zeros are among the largest tenth as theirs are."""
    for name in tasks if data is not None else ():
        yield f"trained: {name}", *trained_masks(name, data)
    for sparsity in (0.002, 0.005, 0.02):
        yield f"random, {100 * sparsity:g} %, large weights", *random_masks(sparsity, target_sparsity=sparsity)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4096, 4096))
    model = get_peft_model(wide, MaskConfig(init_weights=False, target_modules=["0"]))
    yield "the same, 4096 x 4096, 0.5 %", *masks_of(model)


def load_rows(rounds: int) -> tuple[list[tuple[str, ...]], dict[str, object]]:
    """Adding an adapter from disk to a model that has one."""
    with tempfile.TemporaryDirectory() as folder:
        folders, models = {}, {}
        for name, config in {
            "mask, 1 % zeros": MaskConfig(
                binarizer="threshold", candidates=None, init_weights=False, init_sparsity=0.01, seed=0
            ),
            "LoRA r=8": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
        }.items():
            folders[name] = str(Path(folder) / name[:4])
            get_peft_model(base_model(), config).save_pretrained(folders[name])
            models[name] = PeftModel.from_pretrained(base_model(), folders[name])

        def loader(name: str):
            def load() -> None:
                models[name].load_adapter(folders[name], "other")
                models[name].delete_adapter("other")

            return load

        times = in_turn({name: loader(name) for name in models}, rounds)
        sizes = {name: (Path(path) / FILE).stat().st_size for name, path in folders.items()}
    rows, figures = [], {}
    for name, time in times.items():
        ratio = time.ratio(times["LoRA r=8"])
        spread = f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
        rows.append((name, f"{sizes[name]:,}", f"{time.median * 1e3:.0f}", spread))
        figures[name] = {"seconds": time.seconds, "file_bytes": sizes[name]}
    return rows, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a task: masks are trained on them first")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["trec", "ud_ewt_pos"], metavar="TASK")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, figures = [], {}
    for label, masks, weights in cases(args.tasks, args.data):
        for coded, bases in {
            label: None,
            f"{label}, float32": weights,
            f"{label}, bfloat16": [weight.bfloat16() for weight in weights],
        }.items():
            row, figures[coded] = coding_row(label, masks, args.rounds, bases)
            rows.append(row)
    for sparsity in SPARSITIES:
        label = f"random, {100 * sparsity:g} %"
        row, figures[label] = coding_row(label, random_masks(sparsity)[0], args.rounds)
        rows.append(row)
    header = (
        "masks",
        "coded against",
        "zeros",
        "bytes of records",
        "bits a weight",
        "x entropy",
        "encode, ms/10 M",
        "decode, ms/10 M",
    )
    load_header = ("adapter", "file, bytes", "load and delete, ms (median)", "x LoRA (min-max)")
    loads, figures["load"] = load_rows(args.rounds)
    body = (
        "Trained: the default recipe on MiniLM-L6, 10.6 M weights in 36 matrices. Random: its shape, 10.8 M in 37. "
        f"{args.rounds} rounds. Bytes are of the whole records, with headers, fingerprints and checksums; entropy is "
        "the sum of H(zeros / n) n over the matrices, which only a code against the base can go far below. Decoding "
        "includes every check; times of coding are of the processor.\n\n"
        + table(header, rows)
        + "\n\nAdding an adapter from disk to a model (`load_adapter`, then `delete_adapter`), in turn:\n\n"
        + table(load_header, loads)
    )
    report("codec", "Bytes of a mask, and the time to code and load it", body, figures)


if __name__ == "__main__":
    main()
