"""What a batch of several adapters costs, against the base alone, today's twin and LoRA with as many adapters.

python -m benchmarks.mixed [--rounds 9] [--shapes BERT-base "Llama 1024"] [--kinds decode prefill] [--dtypes float32]
python -m benchmarks.mixed --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaModel

from benchmarks.harness import Times, in_turn, report, table
from peft_mask import MaskConfig, MaskLayer, use_triton
from peft_mask.format.packing import bits_from_positions
from peft_mask.layers.serving import ServedLinear

SHAPES: dict[str, dict[str, Any]] = {
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072},
    "Llama 1024": {
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
    },
}
SPARSITY = 0.005
CACHED = 64  # tokens that a decoder has read before the one that is timed
# adapters -> rows, and tokens of each when they are read at once
BATCHES = {1: (16, 64), 4: (16, 64), 16: (16, 64), 64: (64, 16)}


def base_model(shape: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    kind: Any = (LlamaModel, LlamaConfig) if "num_key_value_heads" in shape else (BertModel, BertConfig)
    return kind[0](kind[1](**shape, vocab_size=1000)).to(device, dtype).eval()


def with_tensors_of(model: PeftModel, plain: nn.Module) -> PeftModel:
    """Let a model compute with the very tensors of another: where a copy lies in memory changes a decode call."""
    own = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if name in own:
            parameter.data = own[name].data
    return model


def masked(shape: dict[str, Any], plain: nn.Module, tasks: int, dtype: torch.dtype, device: str) -> PeftModel:
    """The base with masks t0, t1, ... loaded for inference: half a per cent of zeros among the largest tenth."""
    model = get_peft_model(base_model(shape, dtype, device), MaskConfig(inference_mode=True), adapter_name="t0")
    for task in range(1, tasks):
        model.add_adapter(f"t{task}", MaskConfig(inference_mode=True))
    generator = torch.Generator().manual_seed(0)
    for layer in [module for module in with_tensors_of(model, plain).modules() if isinstance(module, MaskLayer)]:
        size = layer.get_base_layer().weight.detach().float().abs().flatten().cpu()
        large = (size > size[:: max(1, len(size) // 20_000)].quantile(0.9)).nonzero().squeeze(1)
        for task in range(tasks):
            chosen = large[torch.randperm(len(large), generator=generator)[: round(SPARSITY * len(size))]]
            bits = bits_from_positions(chosen.sort().values, layer.mask_shape, kept=False)
            layer.peft_mask_bits.fill(f"t{task}", bits.to(device))
    return model.eval()


def lora(shape: dict[str, Any], plain: nn.Module, tasks: int, dtype: torch.dtype, device: str) -> PeftModel:
    """The base with LoRA adapters t0, t1, ..., r=8, on every linear layer."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base_model(shape, dtype, device), config, "t0", autocast_adapter_dtype=False)
    for task in range(1, tasks):
        model.add_adapter(f"t{task}", config)
    return with_tensors_of(model.to(dtype).eval(), plain)


class Caller:
    """Calls a model with a batch: to read it whole (prefill), or one token a row (decode, of a Llama after others)."""

    def __init__(self, kind: str, rows: int, tokens: int, device: str) -> None:
        torch.manual_seed(1)
        self.ids = torch.randint(0, 1000, (rows, tokens if kind == "prefill" else 1), device=device)
        self.decodes, self.cache = kind == "decode", None

    @torch.inference_mode()
    def __call__(self, model: Any, **kwargs: Any) -> torch.Tensor:
        config = model.config
        if not hasattr(config, "num_key_value_heads"):
            return model(input_ids=self.ids, **kwargs).last_hidden_state
        if not self.decodes:
            return model(input_ids=self.ids, use_cache=False, **kwargs).last_hidden_state
        if self.cache is None:
            self.cache = DynamicCache()
            size = len(self.ids), config.num_key_value_heads, CACHED, config.hidden_size // config.num_attention_heads
            dtype = next(model.parameters()).dtype
            for layer in range(config.num_hidden_layers):
                self.cache.update(*(torch.randn(size, dtype=dtype, device=self.ids.device) for _ in "kv"), layer)
        output = model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, **kwargs).last_hidden_state
        self.cache.crop(-1)
        return output


@contextmanager
def forming_masked_weights() -> Iterator[None]:
    """Serve as the readable twin does: W * M is formed for each adapter in each call."""
    with mock.patch.object(ServedLinear, "_served_weight", return_value=None):
        yield


Variants = dict[str, Callable[[], Any]]


def variants_of(
    call: Caller, tasks: int, plain: nn.Module, merged: PeftModel, masks: PeftModel, loras: PeftModel
) -> Variants:
    """What is timed for a batch with so many adapters, their rows in turn; first, whether all masks ways agree."""
    names = [f"t{row % tasks}" for row in range(len(call.ids))]

    def exactly(**kwargs: Any) -> torch.Tensor:
        masks.base_model.set_exact(True)
        try:
            return call(masks, **kwargs)
        finally:
            masks.base_model.set_exact(False)

    def twin(**kwargs: Any) -> torch.Tensor:
        with forming_masked_weights():
            return call(masks, **kwargs)

    def by_triton(**kwargs: Any) -> torch.Tensor:
        use_triton()
        try:
            return call(masks, **kwargs)
        finally:
            use_triton(False)

    variants: Variants = {"base": lambda: call(plain)}
    if tasks == 1:
        variants |= {
            "merged": lambda: call(merged),
            "one active, not merged": lambda: call(masks),
            "the same, W * M formed": twin,
        }
    variants |= {
        "mask": lambda: call(masks, adapter_names=names),
        **({"mask, Triton": lambda: by_triton(adapter_names=names)} if call.ids.is_cuda else {}),
        "mask, exact": lambda: exactly(adapter_names=names),
        "mask, W * M formed": lambda: twin(adapter_names=names),
        "LoRA r=8": lambda: call(loras, adapter_names=names),
    }
    formed, far = variants["mask, W * M formed"](), variants["base"]()
    assert torch.equal(variants["mask, exact"](), formed)
    for name in {"mask", "mask, Triton"} & variants.keys():
        assert (variants[name]() - formed).abs().mean() < 0.1 * (far - formed).abs().mean()
    return variants


def measure(
    shape: str, kind: str, dtype: str, tasks: Sequence[int], rounds: int, device: str
) -> dict[int, dict[str, Times]]:
    """Time all variants of some numbers of adapters; the models are made once."""
    made = SHAPES[shape], getattr(torch, dtype), device
    plain = base_model(*made)
    masks, merged = (masked(made[0], plain, count, *made[1:]) for count in (max(tasks), 1))
    loras = lora(made[0], plain, max(tasks), *made[1:])
    # in tensors of its own, as zeros are written into them
    merged.load_state_dict({name: tensor.clone() for name, tensor in merged.state_dict().items()}, assign=True)
    merged.merge_adapter()
    found = {}
    for count in tasks:
        call = Caller(kind, *BATCHES[count], device)
        variants = variants_of(call, count, plain, merged, masks, loras)
        clock = time.perf_counter if device != "cpu" else time.process_time
        found[count] = in_turn(variants, rounds, warmup=1, clock=clock, device=device)
    return found


def rows_of(found: dict[int, dict[str, Times]]) -> list[list[str]]:
    """A row for each variant, a column for each number of adapters: ratios to the base with the same batch."""
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    cells = {
        (name, count): f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
        for count, times in found.items()
        for name, own in times.items()
        if (ratio := own.ratio(times["base"]))
    }
    first = [["base, ms", *(f"{1e3 * statistics.median(times['base'].seconds):.1f}" for times in found.values())]]
    return first + [[name, *(cells.get((name, count), "-") for count in found)] for name in names if name != "base"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--kinds", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT, of transformers
    parts, figures = [], {}
    for kind in args.kinds:
        for shape in args.shapes:
            for dtype in args.dtypes:
                rounds = args.rounds if kind == "decode" else max(3, args.rounds // 2)
                found = measure(shape, kind, dtype, args.tasks, rounds, args.device)
                title = f"## {kind.capitalize()}, {shape}, {dtype}, {rounds} rounds"
                parts.append(f"{title}\n\n{table(('', *(f'T = {count}' for count in found)), rows_of(found))}")
                print(parts[-1], flush=True)
                figures[f"{kind}, {shape}, {dtype}"] = {
                    count: {name: own.seconds for name, own in times.items()} for count, times in found.items()
                }
    batches = ", ".join(f"{count}: {rows} x {tokens}" for count, (rows, tokens) in BATCHES.items())
    body = (
        "Time of a forward pass of a batch whose rows belong to T adapters in turn, as a ratio to the base model alone "
        f"with the same batch: median (min-max) of ratios round by round. {100 * SPARSITY:g} % zeros among the largest "
        "tenth of the weights of every linear layer, random models of four layers, the same weight tensors for all. "
        f"Decode is one token a row, for the Llama after {CACHED} others; prefill reads rows x tokens ({batches}; as "
        "many rows in decode). `mask` is `adapter_names` as it comes; `exact` after `set_exact(True)`, patched copies "
        "of the weight; `W * M formed` is the readable twin, what every call did before. On a CUDA device `mask` is "
        "corrected by embedding bags, and `Triton` after `use_triton()`. Before timing, exact and twin agreed in every "
        "bit, and `mask` with them to a tenth of what the masks change (in float32 to a 100,000th).\n\n"
        + "\n\n".join(parts)
    )
    report("mixed", "Batches of several adapters", body, figures, args.results, args.device)


if __name__ == "__main__":
    main()
