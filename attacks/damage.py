"""Damages whole adapters, heads included, and demands of each: refused, or every value that is loaded is as saved."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn

from attacks.doors import describe
from attacks.victim import CONFIG, WEIGHTS, base_model, logits, quiet, save_adapter
from peft_mask import keep_scores

# what is damaged: a task head alone, with trained tokens, and a checkpoint with its scores
FIELDS: dict[str, dict[str, Any]] = {
    "head": {},
    "head and tokens": {"trainable_token_indices": {"word_embeddings": [3, 5, 40]}},
    "checkpoint": {"candidates": 0.1},
}


@dataclass
class Findings:
    """What became of damaged adapters.

    Attributes:
        refused: how often, by what was damaged and how it was refused.
        harmless: how many were loaded with every value as saved, by what was damaged.
        accepted: numbers of those that were loaded with another value, with what was damaged.
    """

    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    accepted: dict[int, str] = field(default_factory=dict)


def damage(files: int, seed: int, start: int = 0) -> Findings:
    """Damage and load that many adapters; number n of a seed is the same whatever else is tried."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as top, quiet():
        base = base_model()
        good = {kind: _saved(Path(top, kind), kind) for kind in FIELDS}
        loaded = {
            (kind, door): values(enter(copy.deepcopy(base), folder, kind))
            for kind, folder in good.items()
            for door, enter in DOORS.items()
        }
        for number in range(start, start + files):
            random = Random(f"{seed}:{number}")
            kind, door = random.choice(list(FIELDS)), random.choice(list(DOORS))
            what = random.choice((WEIGHTS, WEIGHTS, WEIGHTS, CONFIG))
            folder = Path(top, "bad")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good[kind], folder)
            content = (folder / what).read_bytes()
            damaged = random.choice(DAMAGES)(random, content)
            if damaged == content:
                findings.harmless[f"{what}, untouched by chance"] += 1
                continue
            (folder / what).write_bytes(damaged)
            try:
                got = values(DOORS[door](copy.deepcopy(base), folder, kind))
            except Exception as error:
                findings.refused[what, describe(error).partition(":")[0]] += 1
                continue
            if differ := differences(loaded[kind, door], got):
                findings.accepted[number] = f"{what} of '{kind}' by {door}: {differ[:3]}"
            else:
                findings.harmless[what] += 1
    return findings


def report(files: int, seed: int, start: int = 0) -> bool:
    """Damage, print the figures; whether nothing was accepted."""
    began = time.perf_counter()
    findings = damage(files, seed, start)
    for (what, error), count in findings.refused.most_common():
        print(f"{count:8} x {what}: {error}")
    for what, count in findings.harmless.most_common():
        print(f"{count:8} x {what}: every value as saved")
    for number, found in findings.accepted.items():
        print(f"ACCEPTED: python -m attacks damage --seed {seed} --start {number} --files 1: {found}")
    print(f"{files} damaged adapters of seed {seed} in {time.perf_counter() - began:.0f} s:")
    print(
        f"{findings.refused.total()} refused, {findings.harmless.total()} harmless, {len(findings.accepted)} accepted"
    )
    return not findings.accepted


# ---- doors ----


def _saved(folder: Path, kind: str) -> Path:
    save_adapter(folder, seed=1, **FIELDS[kind])
    if kind == "checkpoint":
        model = PeftModel.from_pretrained(base_model(), folder, is_trainable=True)
        keep_scores(model)
        model.save_pretrained(folder)
    return folder


def _by_peft(base: nn.Module, folder: Path, kind: str) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, is_trainable=kind == "checkpoint").eval()


def _by_transformers(base: nn.Module, folder: Path, kind: str) -> nn.Module:
    base.load_adapter(folder)  # type: ignore[operator]
    return base.eval()


DOORS: dict[str, Callable[[nn.Module, Path, str], nn.Module]] = {
    "PeftModel.from_pretrained": _by_peft,
    "transformers' load_adapter": _by_transformers,
}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model, the tokens whose rows it trains, and what it computes."""
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            for adapter, indices in module.token_adapter.token_indices.items():
                found[f"{name}, tokens of {adapter}"] = torch.tensor(indices)
    found["what it computes"] = logits(model)
    return found


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    )


# ---- damages ----


def flip(random: Random, data: bytes) -> bytes:
    """Flip one bit, or a few."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(random: Random, data: bytes) -> bytes:
    """Lose a piece: zeros, ones or noise in its place."""
    start = random.randrange(len(data))
    length = min(random.choice((1, 4, 64, 512)), len(data) - start)
    piece = random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
    return data[:start] + piece + data[start + length :]


def cut(random: Random, data: bytes) -> bytes:
    """Lose the end, or a piece."""
    start = random.randrange(len(data))
    return data[:start] if random.random() < 0.5 else data[:start] + data[start + random.randrange(1, 65) :]


def swap(random: Random, data: bytes) -> bytes:
    """Exchange two pieces."""
    length = random.choice((1, 4, 64))
    first, second = sorted(random.sample(range(0, len(data) - length, length), 2))
    piece, other = data[first : first + length], data[second : second + length]
    return data[:first] + other + data[first + length : second] + piece + data[second + length :]


DAMAGES: tuple[Callable[[Random, bytes], bytes], ...] = (flip, flip, overwrite, cut, swap)
