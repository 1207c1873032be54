"""Time to switch between adapters of one base, against copying its fp32 weights and against PEFT's LoRA hot-swap.

python -m benchmarks.switch [--rounds 31] [--device cuda --model BERT-base]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.harness import in_turn, peak_bytes, report, table
from benchmarks.step import MODELS
from peft_mask import MaskConfig, MaskLayer

SPARSITIES = (0.005, 0.01, 0.02, 0.05)


Base = Callable[[], nn.Module]


def base_model(name: str = "MiniLM-L6", device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**MODELS[name][0])).to(device)


def served_masks(sparsity: float, folder: Path, base: Base = base_model) -> PeftModel:
    """One base with two random masks loaded for inference."""
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        config = MaskConfig(binarizer="threshold", candidates=None, init_weights=False, init_sparsity=sparsity)
        get_peft_model(base(), config).save_pretrained(str(folder / name))
    model = PeftModel.from_pretrained(base(), str(folder / "a"), adapter_name="a")
    model.load_adapter(str(folder / "b"), "b")
    return model


def switcher(model: PeftModel) -> Callable[[], None]:
    names = ["a", "b"]

    def switch() -> None:
        names.reverse()
        model.base_model.switch_adapter(names[0])

    return switch


def copier(model: PeftModel) -> Callable[[], None]:
    """Copy the maskable weights from a second copy of the base: what switching by whole weights would cost."""
    weights = [m.get_base_layer().weight.data for m in model.modules() if isinstance(m, MaskLayer)]
    weights = [torch.empty_like(weight) for weight in weights]
    second = [weight.clone() for weight in weights]

    def copy() -> None:
        for weight, source in zip(weights, second, strict=True):
            weight.copy_(source)

    return copy


def hotswapper(folder: Path, base: Base, device: str) -> Callable[[], None]:
    paths = []
    for name in ("x", "y"):
        torch.manual_seed(ord(name))
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base(), config).save_pretrained(str(folder / name))
        paths.append(str(folder / name))
    model = PeftModel.from_pretrained(base(), paths[0])

    def swap() -> None:
        paths.reverse()
        hotswap_adapter(model, paths[0], adapter_name="default", torch_device=device)

    return swap


def check_exact(model: PeftModel, base: Base = base_model) -> None:
    """The base is the same bits after all these switches."""
    model.unmerge_adapter()
    for own, fresh in zip(model.base_model.model.named_parameters(), base().named_parameters(), strict=True):
        assert torch.equal(own[1], fresh[1]), own[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="MiniLM-L6", choices=("MiniLM-L6", "BERT-base"))
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    base = partial(base_model, args.model, args.device)
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = {p: served_masks(p, Path(folder) / str(p), base) for p in SPARSITIES}
        copy = "copy of the fp32 weights"
        variants = {copy: copier(models[SPARSITIES[0]])}
        variants |= {f"switch, {100 * p:g} % zeros": switcher(model) for p, model in models.items()}
        variants["LoRA r=8 hot-swap (from disk, unmerged)"] = hotswapper(Path(folder), base, args.device)
        times = in_turn(variants, args.rounds, warmup=2, device=args.device)
        extra = {name: peak_bytes(run, args.device) for name, run in variants.items()}
        for model in models.values():
            check_exact(model, base)
    for name, time in times.items():
        ratio = time.ratio(times[copy])
        spread = f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
        rows.append((name, f"{time.median * 1e3:.1f}", spread, f"{extra[name] / 1e6:.1f}"))
        figures[name] = {"seconds": time.seconds, "peak_extra_bytes": extra[name]}
    header = ("", "ms (median)", "x copy (min-max)", "memory allocated, MB")
    shapes = [m.mask_shape for m in models[SPARSITIES[0]].modules() if isinstance(m, MaskLayer)]
    weights = sum(shape.numel() for shape in shapes)
    body = (
        f"The {len(shapes)} maskable matrices of a {args.model}-shaped BERT, {weights / 1e6:.1f} M weights, "
        f"{4 * weights / 1e6:.0f} MB in float32; random masks. "
        f"{args.rounds} rounds, variants in turn. A switch is `switch_adapter`: unmerge one mask, activate and merge "
        "the other. Afterwards the base was compared with a fresh one, bit for bit.\n\n" + table(header, rows)
    )
    report("switch", "Switching adapters", body, figures, args.results, args.device)


if __name__ == "__main__":
    main()
