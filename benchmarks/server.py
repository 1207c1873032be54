"""Requests of many clients for many tasks, through a server's batcher: masks, LoRA and the base, mixed batches and not.

python -m benchmarks.server [--adapters 40] [--requests 256] [--rounds 3] [--dtype float32]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import in_turn, report, table
from benchmarks.loaded import OWN, add_copies
from benchmarks.residency import SHAPES, base_model, make_fleet
from peft_mask import AdapterCache
from peft_mask.server import Batcher, Classification, Service, create_app

CLIENTS, SEED = 32, 0
WORDS = (4, 24)  # of a text, at least and at most
Ask = Callable[[str, str], Any]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(1000)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", model_max_length=512)


def questions(names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Return a task and a text for each request, the same in each run."""
    drawn = random.Random(SEED)
    return [
        (drawn.choice(names), " ".join(f"w{drawn.randrange(4, 1000)}" for _ in range(drawn.randint(*WORDS))))
        for _ in range(count)
    ]


class Apart(Classification):
    """Batches of one adapter each, as `@serve.batch` makes them of multiplexed requests."""

    adapter = ""  # whom the next input is for

    def key(self, options: Any) -> object:
        return self.adapter


class Held:
    """What a batcher wants of a cache, for adapters that PEFT has loaded, or none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def lease(self, names: Sequence[str]) -> Any:
        return _Nothing(names)


class _Nothing:
    def __init__(self, names: Sequence[str]) -> None:
        self.rows = names

    async def __aenter__(self) -> Any:
        return _Rows(self.rows)

    def __exit__(self, *error: Any) -> None:
        pass


class _Rows(list[str]):
    adapters = (None,)


class Plain(nn.Module):
    """A model that is asked by name, and has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, adapter_names: Sequence[str] = (), **inputs: Any) -> Any:
        return self.model(**inputs)


@dataclass
class Run:
    """One way to serve: a batcher made anew for each run, as it belongs to an event loop."""

    make: Callable[[], Batcher]
    latencies: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)

    def __call__(self, asked: Sequence[tuple[str, str]]) -> None:
        asyncio.run(self._run(asked))

    async def _run(self, asked: Sequence[tuple[str, str]]) -> None:
        batcher = self.make()

        async def ask(name: str, text: str) -> None:
            if isinstance(batcher.task, Apart):
                batcher.task.adapter = name
            await batcher.ask(name, text)

        await clients(ask, asked, self.latencies)
        self.rows.append(batcher.statistics.rows / batcher.statistics.batches)
        await batcher.close()


async def clients(ask: Ask, asked: Sequence[tuple[str, str]], latencies: list[float]) -> None:
    """Let so many clients ask, each one question after another."""
    left = iter(asked)

    async def client() -> None:
        for question in left:
            start = time.perf_counter()
            await ask(*question)
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


@contextmanager
def served(make: Callable[[], Batcher]) -> Iterator[str]:
    """Serve on loopback, in a thread; gives the address."""
    config = uvicorn.Config(create_app(Service(make()), Classification), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


async def over_http(address: str, asked: Sequence[tuple[str, str]], latencies: list[float]) -> None:
    async with aiohttp.ClientSession() as session:

        async def ask(name: str, text: str) -> None:
            async with session.post(f"{address}/v1/classify", json={"model": name, "input": text}) as response:
                assert response.status == 200, await response.text()
                await response.read()

        await clients(ask, asked, latencies)


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="MiniLM-L6")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as place:
        names = make_fleet(Path(place), options.shape, dtype, options.adapters, options.adapters)
        figures = measure(Path(place), names, options.shape, dtype, options.requests, options.rounds)
    figures = {"shape": options.shape, "dtype": options.dtype, "adapters": options.adapters} | figures
    report(f"server-{options.dtype}", "Requests of many clients for many tasks", body(figures), figures, folder)


def measure(
    folder: Path, names: Sequence[str], shape: str, dtype: torch.dtype, requests: int, rounds: int
) -> dict[str, Any]:
    asked = questions(names, requests)
    model = PeftModel.from_pretrained(base_model(shape, dtype), str(folder / names[0])).eval()
    cache = AdapterCache(model, folder, slots=len(names))
    lora = get_peft_model(
        base_model(shape, dtype),
        LoraConfig(r=8, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False),
        adapter_name=OWN,
        autocast_adapter_dtype=False,
    ).eval()
    add_copies(lora, names)
    held, plain = Held(lora), Held(Plain(base_model(shape, dtype)))
    task = Classification(tokenizer(), 512)
    runs = {
        "base alone": Run(lambda: Batcher(plain, task)),  # type: ignore[arg-type]
        "masks, mixed batches": Run(lambda: Batcher(cache, task)),
        "masks, batches of one adapter": Run(lambda: Batcher(cache, Apart(tokenizer(), 512))),
        "masks, single rows": Run(lambda: Batcher(cache, task, max_rows=1)),
        "LoRA r=8, mixed batches": Run(lambda: Batcher(held, task)),  # type: ignore[arg-type]
    }
    times = in_turn({name: (lambda run=run: run(asked)) for name, run in runs.items()}, rounds, clock=time.process_time)
    base = times["base alone"]
    ways = {
        name: {
            "rows a batch": statistics.mean(run.rows),
            "of the base": times[name].ratio(base),
            "milliseconds": _percentiles(run.latencies[-rounds * len(asked) :]),
        }
        for name, run in runs.items()
    }
    latencies: list[float] = []
    with served(lambda: Batcher(cache, task)) as address:
        asyncio.run(over_http(address, asked, []))
        start = time.perf_counter()
        for _ in range(rounds):
            asyncio.run(over_http(address, asked, latencies))
        seconds = time.perf_counter() - start
    cache.close()
    return {
        "requests": len(asked),
        "ways": ways,
        "http": {"requests a second": rounds * len(asked) / seconds, "milliseconds": _percentiles(latencies)},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=20)
    return {"p50": 1e3 * cuts[9], "p95": 1e3 * cuts[18]}


def body(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{way['rows a batch']:.1f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*way["of the base"]),
            f"{way['milliseconds']['p50']:.0f}",
            f"{way['milliseconds']['p95']:.0f}",
        ]
        for name, way in figures["ways"].items()
    ]
    http = figures["http"]
    about = (
        f"{CLIENTS} clients, each one question after another; {figures['requests']} questions a run of {WORDS[0]} to "
        f"{WORDS[1]} words, each for one of {figures['adapters']} adapters of a {figures['shape']} in "
        f"{figures['dtype']}. In one process without HTTP; processor time of a run, "
        "round by round beside the base alone."
    )
    times = http["milliseconds"]
    over_http = (
        f"Over HTTP, with the clients in the same process: {http['requests a second']:.0f} requests a second "
        f"(p50 {times['p50']:.0f} ms, p95 {times['p95']:.0f} ms)."
    )
    found = table(["batches", "rows a batch", "time, x base", "p50, ms", "p95, ms"], rows)
    return f"{about}\n\n{found}\n\n{over_http}"


if __name__ == "__main__":
    main()
