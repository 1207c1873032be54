"""A random Llama through the life of an adapter: trained, saved, loaded, merged and unmerged; time and peak memory.

python -m benchmarks.llama --device cuda --shape 7B                # the base in bfloat16
python -m benchmarks.llama --device cuda --shape 7B --base nf4     # in 4 bits, by bitsandbytes
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import peak_bytes, report, table, wait_for
from benchmarks.memory import LLAMA_1B
from peft_mask import MaskConfig, MaskLayer, SignAdamW, create_mask_optimizer

# "7B" is what transformers makes of a Llama without further fields
SHAPES: dict[str, dict[str, Any]] = {"1B": LLAMA_1B, "7B": {}}


def base_model(shape: dict[str, Any], quantized: bool, device: str) -> PreTrainedModel:
    """Make a model in bfloat16; if it is to be quantized, all linear layers of its blocks in 4 bits, one at a time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape)
    blocks, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layers = model.model.layers
        for number in range(blocks):
            if number > 0:
                layers.append(type(layers[0])(config, number).to(torch.bfloat16))
            for name, module in list(layers[number].named_modules()):
                if quantized and isinstance(module, nn.Linear):
                    layers[number].set_submodule(name, quantize(module))
    config.num_hidden_layers = blocks
    return cast(PreTrainedModel, model)


def quantize(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    kind = {"quant_type": "nf4", "compress_statistics": True}
    new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, device="meta", **kind)
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **kind)
    new.weight = weight.to(linear.weight.device)  # which quantizes it
    return cast(nn.Module, new)


class Life:
    """The steps of a life, in the order in which they are taken; each is checked.

    Args:
        base: the model to mask.
        tokens: of a batch of one row.
        steps: of training.
        folder: that the adapter is saved to.
    """

    def __init__(self, base: PreTrainedModel, tokens: int, steps: int, folder: Path) -> None:
        self.base, self.steps, self.folder = base, steps, folder
        vocabulary = base.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(base.device)
        self.before = checksums(base)
        self.model: PeftModel | None = None
        self.masks: list[torch.Tensor] = []
        self.masked: torch.Tensor | None = None

    def stages(self) -> dict[str, Callable[[], None]]:
        return {
            "wrap": self.wrap,
            "train": self.train,
            "save": self.save,
            "load": self.load,
            "compute masked": self.compute,
            "merge": self.merge,
            "unmerge": self.unmerge,
        }

    @property
    def layers(self) -> list[MaskLayer]:
        assert self.model is not None
        return [module for module in self.model.modules() if isinstance(module, MaskLayer)]

    def wrap(self) -> None:
        self.model = cast(
            PeftModel, get_peft_model(self.base, MaskConfig(task_type="CAUSAL_LM", scores_dtype="bfloat16"))
        )

    def train(self) -> None:
        assert self.model is not None
        self.base.gradient_checkpointing_enable()
        optimizer = create_mask_optimizer(self.model.train())
        cast(SignAdamW, optimizer).step_in_backward()
        for _ in range(self.steps):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.isfinite()
        self.masks = [layer.packed_mask("default") for layer in self.layers]
        self.base.gradient_checkpointing_disable()

    def save(self) -> None:
        assert self.model is not None
        self.model.save_pretrained(self.folder)

    def load(self) -> None:
        assert self.model is not None
        self.model.load_adapter(self.folder, "saved")
        self.model.set_adapter("saved")
        self.model.delete_adapter("default")
        loaded = [layer.packed_mask("saved") for layer in self.layers]
        assert all(torch.equal(a, b) for a, b in zip(loaded, self.masks, strict=True))

    def compute(self) -> None:
        self.masked = self._logits()

    def merge(self) -> None:
        assert self.model is not None
        self.model.merge_adapter()
        assert self.masked is not None
        assert torch.equal(self._logits(), self.masked)

    def unmerge(self) -> None:
        assert self.model is not None
        self.model.unmerge_adapter()
        assert checksums(self.base) == self.before

    @torch.inference_mode()
    def _logits(self) -> torch.Tensor:
        assert self.model is not None
        return cast(torch.Tensor, self.model.eval()(input_ids=self.ids).logits)


def checksums(model: nn.Module) -> list[int]:
    """A checksum of the bytes of every weight that is not an adapter's."""
    weights = [p.detach() for name, p in model.named_parameters() if "peft_mask" not in name]
    return [zlib.crc32(weight.view(torch.uint8).cpu().numpy()) for weight in weights]


def measure(life: Life, device: str) -> dict[str, dict[str, float]]:
    """Take all steps of a life; return seconds and peak bytes of each, model and adapter included."""
    figures = {}
    for name, stage in life.stages().items():
        held = bytes_of(life.base)
        start = time.perf_counter()
        peak = peak_bytes(stage, device)
        wait_for(device)
        figures[name] = {"seconds": time.perf_counter() - start, "peak_bytes": held + peak}
    return figures


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--base", choices=("bfloat16", "nf4"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = base_model(SHAPES[options.shape], options.base == "nf4", options.device)
        held = bytes_of(base)
        life = Life(base, options.tokens, options.steps, Path(folder))
        figures = measure(life, options.device)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    weights = sum(layer.mask_shape.numel() for layer in life.layers)
    rows = [(name, f"{f['seconds']:.1f}", f"{f['peak_bytes'] / 2**30:.2f}") for name, f in figures.items()]
    body = (
        f"A random Llama of {options.shape} in {options.base}, {held / 2**30:.2f} GiB; {weights / 1e6:,.0f} M masked "
        f"weights. Trained on one row of {options.tokens} tokens, {options.steps} steps taken in the backward pass, "
        f"bfloat16 scores, activations checkpointed. The adapter has {size:,} bytes, {8 * size / weights:.4f} bit a "
        "weight. The loaded masks are those that were trained, merged it computes what it computed masked, and "
        "unmerged every byte of the base is back: compared.\n\n"
        + table(("stage", "seconds", "GiB at the most, model included"), rows)
    )
    summary = {"base_bytes": held, "adapter_bytes": size, "masked_weights": weights, "stages": figures}
    title = "A Llama through the life of an adapter"
    report(f"llama-{options.shape}-{options.base}", title, body, summary, options.results, options.device)


if __name__ == "__main__":
    main()
