"""Bytes of a mask against its entropy and against LoRA, and the time to encode, decode and load.

python -m benchmarks.codec [--adapter FOLDER ...] [--rounds 15]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.harness import in_turn, report, table
from benchmarks.switch import base_model
from peft_mask import MaskConfig, Masks
from peft_mask.fingerprint import fingerprint_of
from peft_mask.layer import MaskLayer
from peft_mask.packing import entropy_bits, pack_bits
from peft_mask.record import read_record, write_record

SPARSITIES = (0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 0.5)
FILE = "adapter_model.safetensors"


def random_masks(sparsity: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(
        base_model(), MaskConfig(binarizer="threshold", candidates=None, init_weights=False, init_sparsity=sparsity)
    )
    return {name: m.mask("default") for name, m in model.named_modules() if isinstance(m, MaskLayer)}


def coding_row(label: str, masks: list[torch.Tensor], rounds: int) -> tuple[tuple[str, ...], dict[str, object]]:
    fingerprint = fingerprint_of(torch.ones(1))
    packed = [(pack_bits(mask), mask.shape) for mask in masks]
    records = [write_record(bits, shape, fingerprint) for bits, shape in packed]
    assert all(torch.equal(read_record(r).bits, b) for r, (b, _) in zip(records, packed, strict=True))
    times = in_turn(
        {
            "encode": lambda: [write_record(bits, shape, fingerprint) for bits, shape in packed],
            "decode": lambda: [read_record(r, s) for r, (_, s) in zip(records, packed, strict=True)],
        },
        rounds,
    )
    weights = sum(mask.numel() for mask in masks)
    zeros = sum(int((~mask).sum()) for mask in masks)
    size = sum(map(len, records))
    bound = sum(entropy_bits(int((~mask).sum()), mask.numel()) for mask in masks) / 8
    per_10m = {name: time.median * 1e7 / weights for name, time in times.items()}
    row = (
        label,
        f"{100 * zeros / weights:.2f} %",
        f"{size:,}",
        f"{8 * size / weights:.3f}",
        f"{size / bound:.3f}",
        f"{1e3 * per_10m['encode']:.0f}",
        f"{1e3 * per_10m['decode']:.0f}",
    )
    figures = {"bytes": size, "entropy_bytes": bound, "weights": weights, "zeros": zeros, "seconds_per_10M": per_10m}
    return row, figures


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
    parser.add_argument("--adapter", nargs="*", default=[], help="folders of trained adapters to code as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, figures = [], {}
    for folder in args.adapter:
        label = f"trained: {Path(folder).name}"
        row, figures[label] = coding_row(label, list(Masks.load(folder).values()), args.rounds)
        rows.append(row)
    for sparsity in SPARSITIES:
        label = f"random, {100 * sparsity:g} %"
        row, figures[label] = coding_row(label, list(random_masks(sparsity).values()), args.rounds)
        rows.append(row)
    header = ("masks", "zeros", "bytes of records", "bits a weight", "x entropy", "encode, ms/10 M", "decode, ms/10 M")
    load_header = ("adapter", "file, bytes", "load and delete, ms (median)", "x LoRA (min-max)")
    loads, figures["load"] = load_rows(args.rounds)
    body = (
        f"MiniLM-L6-shaped, 10.8 M weights in 37 matrices; {args.rounds} rounds. Bytes are of the whole records, with "
        "headers, fingerprints and checksums; entropy is the sum of H(zeros / n) n over the matrices. Decoding "
        "includes every check.\n\n"
        + table(header, rows)
        + "\n\nAdding an adapter from disk to a model (`load_adapter`, then `delete_adapter`), in turn:\n\n"
        + table(load_header, loads)
    )
    report("codec", "Bytes of a mask, and the time to code and load it", body, figures)


if __name__ == "__main__":
    main()
