"""Many clients, random tasks, two replicas of Ray Serve, and all that can go wrong: each answer is compared.

    python -m tests.server.cluster_job FOLDER --requests 10000

More adapters than slots and than memory has room for; one that is damaged and one that is not there; a new version
while requests come; and a replica that is killed. Prints what was counted as JSON.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import shutil
import socket
import time
from collections import Counter
from pathlib import Path

import aiohttp
import ray
from ray import serve

from peft_mask.server.cluster import Replicas, build
from tests.server.places import KINDS, TEXTS, Place

NAMES = [f"task-{number}" for number in range(40)]
NEW = "task-0"  # has a new version in the middle
CLIENTS = 32


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def make(root):
    """Write the adapters, one of them behind a link that can be turned over, and return what each answers alone."""
    place = Place(root, KINDS["classify"], NAMES)
    answers = {name: place.alone(name, number) for number, name in enumerate(NAMES)}
    expected = {name: {text: ask(text) for text in TEXTS} for name, ask in answers.items()}
    for text in TEXTS:
        best = {(own[text][0]["label"], round(own[text][0]["score"], 3)) for own in expected.values()}
        assert len(best) == len(NAMES), "answers do not tell adapters apart"
    shutil.copytree(place.adapters / "task-1", place.adapters / "damaged")
    file = place.adapters / "damaged" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)
    place.save(f"new-{NEW}", 0, target_sparsity=0.5)
    (root / "versions").mkdir()
    for source, version in ((NEW, "old"), (f"new-{NEW}", "new")):
        (place.adapters / source).rename(root / "versions" / version)
    (place.adapters / NEW).symlink_to(root / "versions" / "old")
    new = place.alone("../versions/new", 0)
    return place, expected, {text: new(text) for text in TEXTS}


def turn_over(place, root):
    link = place.adapters / "next"
    link.symlink_to(root / "versions" / "new")
    link.replace(place.adapters / NEW)


def is_right(entry, own):
    (best,) = entry["labels"]
    return best["label"] == own[0]["label"] and abs(best["score"] - own[0]["score"]) < 1e-4


class Clients:
    """What clients ask, and what came of it."""

    def __init__(self, url, expected, new, seed):
        self.url, self.expected, self.new = url, expected, new
        self.random = random.Random(seed)
        self.counts = Counter()
        self.left = 0
        self.wrong, self.lost = [], []
        self.is_new = False  # whether the new version has been told to all replicas

    async def run(self, requests):
        self.left = requests
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
            await asyncio.gather(*(self._client(session) for _ in range(CLIENTS)))

    async def _client(self, session):
        while self.left > 0:
            self.left -= 1
            count = self.random.choice((1, 1, 2, 4))
            names = [self.random.choice([*NAMES, "damaged", "nobody"]) for _ in range(count)]
            texts = [self.random.choice(TEXTS) for _ in names]
            must_be_new = self.is_new
            async with session.post(f"{self.url}/v1/classify", json={"model": names, "input": texts}) as response:
                answer = await response.json(content_type=None)
            self.counts[f"status {response.status}"] += 1
            refused = sum(name in ("damaged", "nobody") for name in names)
            if response.status == 200:
                for name, text, entry in zip(names, texts, answer["data"], strict=True):
                    self._check(name, text, entry, must_be_new)
            elif refused == count and response.status in (404, 422):
                self.counts["refused"] += count
            else:
                self.lost.append((names, response.status, answer))

    def _check(self, name, text, entry, must_be_new):
        if name in ("damaged", "nobody"):
            right = entry.get("error", {}).get("code") == (422 if name == "damaged" else 404)
            self.counts["refused"] += right
        elif "error" in entry:
            self.lost.append((name, entry))
            return
        else:
            allowed = [self.expected[name][text]] if not (name == NEW and must_be_new) else []
            if name == NEW:
                allowed.append(self.new[text])
                self.counts["new"] += is_right(entry, self.new[text])
            right = any(is_right(entry, own) for own in allowed)
            self.counts["answers"] += right
        if not right:
            self.wrong.append((name, text, entry, must_be_new))


def kill_one():
    replica = next(
        own
        for own in ray.util.list_named_actors(all_namespaces=True)
        if own["name"].startswith("SERVE_REPLICA::peft-mask#Replica")
    )
    ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))


async def disturb(clients, place, root, requests, session):
    """Turn a version over at a third of the requests, and kill a replica at two thirds."""
    while clients.left > requests * 2 // 3:
        await asyncio.sleep(0.05)
    turn_over(place, root)
    async with session.post(f"{clients.url}/v1/models/{NEW}/refresh") as response:
        clients.counts["refreshed"] = response.status
    clients.is_new = True
    while clients.left > requests // 3:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(kill_one)
    clients.counts["killed"] += 1


async def lost_without_trying_again(handle):
    """Return how many of 512 requests in flight are lost with a replica if nobody asks again."""
    asked = [handle.answers.remote([("task-1", TEXTS[3])], {}) for _ in range(512)]
    await asked[20]
    await asyncio.to_thread(kill_one)
    outcomes = await asyncio.gather(*(asyncio.wait_for(_of(each), 60) for each in asked), return_exceptions=True)
    return Counter(type(each).__name__ for each in outcomes)


async def _of(response):
    return await response


async def main(folder, requests, seed, affinity):
    root = Path(folder)
    place, expected, new = make(root)
    port = free_port()
    # for half of the adapters, so that they come from the source again and again
    size = sum(file.stat().st_size for file in (place.adapters / NAMES[1]).glob("*.safetensors"))
    settings = place.settings(
        replicas=2,
        threads=1,
        slots=64 if affinity else 6,
        max_rows=16,
        max_bytes=str(size * (100 if affinity else 20)),
        timeout=120.0,
        affinity=affinity,
    )
    ray.init(
        num_cpus=6, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="ERROR"
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    await asyncio.to_thread(serve.run, build(dataclasses.asdict(settings)), name="peft-mask")
    clients = Clients(f"http://127.0.0.1:{port}", expected, new, seed)
    start = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            clients.run(requests), *([] if affinity else [disturb(clients, place, root, requests, session)])
        )
        seconds = time.perf_counter() - start
        names = ["Replica-0", "Replica-1"] if affinity else ["Replica"]
        handles = [serve.get_deployment_handle(name, "peft-mask") for name in names]
        backend = Replicas(handles)
        while len(figures := await backend.figures()) < 2:  # the one that was killed comes again
            await asyncio.sleep(1)
        lost = {} if affinity else await lost_without_trying_again(handles[0])
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "requests a second": round(requests / seconds, 1),
                **clients.counts,
                "wrong": len(clients.wrong),
                "lost": len(clients.lost),
                "first": [*clients.wrong[:2], *clients.lost[:2]],
                "replicas": figures,
                "what becomes of 512 without trying again": lost,
            }
        ),
        flush=True,
    )
    await asyncio.to_thread(serve.shutdown)
    ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--affinity", action="store_true", help="each adapter on one replica, and nobody is killed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    said = parser.parse_args()
    asyncio.run(main(said.folder, said.requests, said.seed, said.affinity))
