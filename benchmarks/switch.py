"""Time to switch between adapters of one base, against copying its fp32 weights and against PEFT's LoRA hot-swap.

python -m benchmarks.switch [--rounds 31]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.harness import in_turn, peak_bytes, report, table
from benchmarks.step import MODELS
from peft_mask import MaskConfig
from peft_mask.layer import MaskLayer

SPARSITIES = (0.005, 0.01, 0.02, 0.05)


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**MODELS["MiniLM-L6"][0]))


def served_masks(sparsity: float, folder: Path) -> PeftModel:
    """One base with two random masks loaded for inference."""
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        config = MaskConfig(binarizer="threshold", candidates=None, init_weights=False, init_sparsity=sparsity)
        get_peft_model(base_model(), config).save_pretrained(str(folder / name))
    model = PeftModel.from_pretrained(base_model(), str(folder / "a"), adapter_name="a")
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


def hotswapper(folder: Path) -> Callable[[], None]:
    paths = []
    for name in ("x", "y"):
        torch.manual_seed(ord(name))
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base_model(), config).save_pretrained(str(folder / name))
        paths.append(str(folder / name))
    model = PeftModel.from_pretrained(base_model(), paths[0])

    def swap() -> None:
        paths.reverse()
        hotswap_adapter(model, paths[0], adapter_name="default", torch_device="cpu")

    return swap


def check_exact(model: PeftModel) -> None:
    """The base is the same bits after all these switches."""
    model.unmerge_adapter()
    for own, fresh in zip(model.base_model.model.named_parameters(), base_model().named_parameters(), strict=True):
        assert torch.equal(own[1], fresh[1]), own[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = {p: served_masks(p, Path(folder) / str(p)) for p in SPARSITIES}
        copy = "copy of the fp32 weights"
        variants = {copy: copier(models[SPARSITIES[0]])}
        variants |= {f"switch, {100 * p:g} % zeros": switcher(model) for p, model in models.items()}
        variants["LoRA r=8 hot-swap (from disk, unmerged)"] = hotswapper(Path(folder))
        times = in_turn(variants, args.rounds, warmup=2)
        extra = {name: peak_bytes(run) for name, run in variants.items()}
        for model in models.values():
            check_exact(model)
    for name, time in times.items():
        ratio = time.ratio(times[copy])
        spread = f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
        rows.append((name, f"{time.median * 1e3:.1f}", spread, f"{extra[name] / 1e6:.1f}"))
        figures[name] = {"seconds": time.seconds, "peak_extra_bytes": extra[name]}
    header = ("", "ms (median)", "x copy (min-max)", "memory allocated, MB")
    body = (
        f"The 37 maskable matrices of a MiniLM-L6-shaped BERT, 10.8 M weights, 43 MB in float32; random masks. "
        f"{args.rounds} rounds, variants in turn. A switch is `switch_adapter`: unmerge one mask, activate and merge "
        "the other. Afterwards the base was compared with a fresh one, bit for bit.\n\n" + table(header, rows)
    )
    report("switch", "Switching adapters", body, figures)


if __name__ == "__main__":
    main()
