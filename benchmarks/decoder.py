"""Perplexity of held-out text after a short training of a real decoder: masks, LoRA r=8 and full fine-tuning.

    python -m examples.smollm2 smollm2
    python -m benchmarks.decoder --model smollm2 --data FOLDER
    python -m benchmarks.decoder report            # the pages of the results at hand

FOLDER holds `train.jsonl`, `dev.jsonl` and `test.jsonl` with texts. Every method sees the same blocks in the same
order. Dev chooses the rate at which test is scored. Each run is a row of `results/decoder/runs.jsonl`: what has a row
is not run again. An hour on a laptop whose processor multiplies in bfloat16; for others there is `--dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from benchmarks.accuracy.sizes import measure
from benchmarks.harness import RESULTS, environment, report, table, together
from benchmarks.runs_file import Row, RunsFile
from peft_mask import MaskConfig, SparsitySchedule, create_mask_optimizer, spend_budget
from peft_mask.recipes.causal_lm import pack

BLOCK_SIZE = 128
KEY = ("data", "dtype", "steps", "batch_size", "method", "rate")
BASE = "base model"  # in the place of a method
SEED = 0
WARMUP = 0.1
SPLITS = {"dev": 32, "test": 64}  # blocks that are scored


@dataclass(frozen=True)
class Method:
    """How a base model becomes trainable, and the rates among which dev chooses."""

    build: Callable[[nn.Module], nn.Module]
    optimizer: Callable[[nn.Module, float], Optimizer]
    rates: tuple[float, ...]
    before_step: Callable[[Any, float], None] = lambda model, progress: None  # progress from 0 to 1


def adamw(model: nn.Module, rate: float) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))


def growing(end: float) -> Callable[[Any, float], None]:
    """Let the budget of a mask grow up to this fraction of the training."""
    schedule = SparsitySchedule("linear", end=end)
    return lambda model, progress: spend_budget(model, schedule.share(progress))


def mask(before_step: Callable[[Any, float], None] = lambda model, progress: None, **fields: Any) -> Method:
    def build(model: nn.Module) -> nn.Module:
        return get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", **fields))

    # any rate does the same
    return Method(build, lambda model, rate: create_mask_optimizer(model, mask_lr=rate), (5e-4,), before_step)


METHODS = {
    "mask": mask(),
    "mask, growing": mask(growing(0.5)),
    "mask, growing over a fifth": mask(growing(0.2)),
    "LoRA r=8": Method(lora, adamw, (1e-3, 3e-3, 1e-2)),
    "full fine-tuning": Method(lambda model: model, adamw, (1e-4, 3e-4, 1e-3)),
    "mask, 2 % off": mask(target_sparsity=0.02),
    "mask, 2 % off, growing": mask(growing(0.5), target_sparsity=0.02),
    "mask, 2 % off, growing over a fifth": mask(growing(0.2), target_sparsity=0.02),
    "mask, 0.17 % off": mask(target_sparsity=0.0017),
}


def drawn(rows: int, wanted: int, seed: int) -> torch.Tensor:
    """Return numbers of so many rows, each once an epoch, in an order that follows from the seed: int64, (wanted,)."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-wanted // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[:wanted]


def take_steps(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    before_step: Callable[[Any, float], None],
) -> list[float]:
    """Take a step on each batch, with linear warm-up and decay and a gradient norm of 1; return the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * len(batches)), len(batches))
    losses: list[float] = []
    model.train()
    for number, batch in enumerate(batches, start=1):
        before_step(model, number / len(batches))
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"  step {len(losses)}, loss {sum(losses[-10:]) / 10:.3f}", flush=True)
    return losses


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    model: str
    data: str
    blocks: dict[str, torch.Tensor]  # split -> (blocks, BLOCK_SIZE)
    steps: int
    batch_size: int
    dtype: str = "bfloat16"  # of products

    def base(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def batches(self) -> list[torch.Tensor]:
        train = self.blocks["train"]
        return list(train[drawn(len(train), self.steps * self.batch_size, SEED)].split(self.batch_size))

    def loss(self, model: nn.Module, blocks: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return model(input_ids=blocks, labels=blocks).loss

    def score(self, model: nn.Module, split: str) -> float:
        """Return the mean negative log-likelihood of a token of `split`, in nats."""
        blocks = self.blocks[split]
        model.eval()
        with torch.inference_mode():
            total = sum(self.loss(model, batch).item() * len(batch) for batch in blocks.split(4))
        return total / len(blocks)


def train(method: Method, rate: float, setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(SEED)
    model = method.build(setting.base())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = time.perf_counter()
    losses = take_steps(model, method.optimizer(model, rate), setting.batches(), setting.loss, method.before_step)
    figures = {"seconds": time.perf_counter() - start, "losses": losses, "trained": trained}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, figures | measure(Path(folder))


def runs_in(results: Path) -> RunsFile:
    """The file of all runs, in this folder of results."""
    return RunsFile(results / "decoder", KEY)


def run(name: str, rate: float, setting: Setting, results: Path, best: float) -> Row:
    """Train once, unless there is a result; score dev, and test if no rate tried before was better on dev.

    Args:
        name: of a method, or `BASE`.
        rate: learning rate.
        setting: what all runs share.
        results: folder of the results.
        best: lowest loss on dev of the rates before.
    """
    what = (setting.data, setting.dtype, setting.steps, setting.batch_size, name, rate)
    if (done := runs_in(results).read().get(what)) is not None:
        return done
    print(f"{name}, rate {rate:g}", flush=True)
    model, figures = train(METHODS[name], rate, setting) if name in METHODS else (setting.base(), {})
    result = {**dict(zip(KEY, what, strict=True)), "dev": setting.score(model, "dev"), **figures}
    if result["dev"] < best:
        result["test"] = setting.score(model, "test")
    print(f"  { ({key: value for key, value in result.items() if key != 'losses'}) }", flush=True)
    result |= {"environment": environment()}
    runs_in(results).add(result)
    return result


def run_rates(name: str, rates: Sequence[float], setting: Setting, results: Path) -> None:
    """Do the runs at these rates, one after the other."""
    best = math.inf
    for rate in rates:
        best = min(best, run(name, rate, setting, results, best)["dev"])


def rates_of(name: str, only: Sequence[float]) -> Sequence[float]:
    """Return those of a method's rates that are in `only`, all of them if none is; the base model has none to tell."""
    rates = METHODS[name].rates if name in METHODS else (0.0,)
    return [rate for rate in rates if rate in only] or rates


def write_pages(results: Path) -> None:
    """Write decoder.md, and decoder-float32.md of runs in float32, with a table for each setting at hand."""
    found: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for run in runs_in(results).read().values():
        setting = run["data"], run["steps"], run["batch_size"]
        found.setdefault(run["dtype"], {}).setdefault(setting, []).append(run)
    for dtype, by_setting in found.items():
        tables, best = zip(*(setting_table(runs) for runs in by_setting.values()), strict=True)
        where = together([run["environment"] for runs in by_setting.values() for run in runs])
        name = "decoder" if dtype == "bfloat16" else f"decoder-{dtype}"
        title = "A decoder: perplexity of held-out text"
        report(name, title, "\n\n".join(tables), [run for runs in best for run in runs], results, where=where)


def setting_table(runs: Sequence[Row]) -> tuple[str, list[Row]]:
    """Return the table of runs of one setting, and of each method the run at the rate with the lowest loss on dev."""
    methods = [BASE, *METHODS]
    tries: dict[str, list[Row]] = {}
    for run in sorted(runs, key=lambda run: methods.index(run["method"])):
        tries.setdefault(run["method"], []).append(run)
    best = [min(tried, key=lambda run: run["dev"]) for tried in tries.values()]
    dev = [{run["rate"]: run["dev"] for run in tried} for tried in tries.values()]
    first = runs[0]
    text = (
        f"{first['data']}, {first['steps']} steps of {first['batch_size']} blocks of {BLOCK_SIZE} tokens, one seed; "
        "perplexity, on test at the rate that is best on dev; linear warm-up over a tenth of the steps and linear "
        f"decay, gradient norm 1, no weight decay, products in {first['dtype']}.\n\n"
    )
    header = ("method", "dev", "test", "bytes", "bits a weight", "rates tried: dev")
    return text + table(header, list(map(row, best, dev))), best


def row(result: Row, dev: Mapping[float, float]) -> tuple[str, ...]:
    return (
        result["method"],
        f"{math.exp(result['dev']):.2f}",
        f"{math.exp(result['test']):.2f}",
        f"{result['bytes']:,}" if "bytes" in result else "0",
        f"{result['bits_per_weight']:.3f}" if "bits_per_weight" in result else "",
        ", ".join(f"{rate:g}: {math.exp(loss):.2f}" for rate, loss in dev.items()) if result["rate"] else "",
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--model", help="folder of the decoder")
    parser.add_argument("--data", type=Path, help="folder of train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--field", default="text", help="name of the text in each line")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=2, help=f"blocks of {BLOCK_SIZE} tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[], help="of a method's rates only these, where it has any"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of products")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.command == "report":
        write_pages(options.results)
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed: the folders of the decoder and of the texts")
    known = sorted({rate for name in options.methods for rate in METHODS[name].rates})
    if unknown := set(options.rates).difference(known):
        told = ", ".join(f"{rate:g}" for rate in sorted(unknown))
        parser.error(f"--rates: no method tries {told}; choose from {', '.join(f'{rate:g}' for rate in known)}")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks = {}
    for split in ("train", *SPLITS):
        lines = (options.data / f"{split}.jsonl").read_text("utf-8").split("\n")
        texts = [json.loads(line)[options.field] for line in lines if line]
        random.Random(SEED).shuffle(texts)  # some come sorted by label, and then each text helps to predict the next
        blocks[split] = pack(texts, tokenizer, BLOCK_SIZE)[: SPLITS.get(split)]
    setting = Setting(options.model, options.data.name, blocks, options.steps, options.batch_size, options.dtype)
    for name in (BASE, *options.methods):
        run_rates(name, rates_of(name, options.rates), setting, options.results)
    runs_in(options.results).tidy()
    write_pages(options.results)


if __name__ == "__main__":
    main()
