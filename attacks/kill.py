"""Kills processes that save adapters over each other, and looks at what is in the folder."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel

from attacks.doors import describe
from attacks.victim import CONFIG, WEIGHTS, base_model, logits, quiet, save_adapter
from peft_mask import Masks

OLD, NEW, PAIR, BROKEN = "first adapter", "second adapter", "tensors of one, configuration of the other", "broken"


class Saver:
    """Two adapters of one model, of the same or of different modules, and how they are written.

    Args:
        top: a folder to keep them in.
        way: "save_pretrained" or "Masks.save".
        alike: whether the two mask the same modules.
    """

    def __init__(self, top: Path, way: str, alike: bool = True) -> None:
        other = {} if alike else {"target_modules": ["query", "value"]}
        sources = [
            save_adapter(top / "first", seed=1),
            save_adapter(top / "second", seed=2, target_sparsity=0.1, **other),
        ]
        self.models = [PeftModel.from_pretrained(base_model(), source).eval() for source in sources]
        self.masks = [Masks.load(source) for source in sources]
        write: Callable[[Any, Path], None] = PeftModel.save_pretrained if way == "save_pretrained" else Masks.save
        values = self.models if way == "save_pretrained" else self.masks
        self.saves = [lambda folder, value=value: write(value, folder) for value in values]
        self.folder = top / "target"
        self.contents, self.logits = [], []
        self.seconds = 0.0  # that both take together
        for save in self.saves:
            began = time.perf_counter()
            save(self.folder)
            self.seconds += time.perf_counter() - began
            self.contents.append({name: (self.folder / name).read_bytes() for name in (WEIGHTS, CONFIG)})
            self.logits.append(logits(PeftModel.from_pretrained(base_model(), self.folder).eval()))

    def save_for_ever(self) -> None:
        """Save one after the other."""
        while True:
            for save in self.saves:
                save(self.folder)

    def found(self) -> tuple[str, str]:
        """What is in the folder, by its bytes, and what becomes of it when it is loaded."""
        parts = [
            next(
                (i for i, content in enumerate(self.contents) if content[name] == (self.folder / name).read_bytes()),
                None,
            )
            for name in (WEIGHTS, CONFIG)
        ]
        if None in parts:
            return BROKEN, f"a file is neither of the two: {parts}"
        state = (OLD, NEW)[parts[0] or 0] if parts[0] == parts[1] else PAIR
        masks = Masks.load(self.folder)
        if masks != self.masks[parts[0] or 0]:
            return BROKEN, "Masks.load reads other masks"
        try:
            with quiet():
                computed = logits(PeftModel.from_pretrained(base_model(), self.folder).eval())
        except ValueError as error:
            return (state if state == PAIR else BROKEN), f"refused: {describe(error)}"
        if torch.equal(computed, self.logits[parts[0] or 0]):
            return state, "loads whole"
        return BROKEN, "computes something else"


def kill(kills: int, seed: int, way: str, alike: bool = True) -> Counter[tuple[str, str]]:
    """Kill that many processes at random moments of endless saving; count what was found in the folder."""
    random, outcomes = Random(seed), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as top, quiet():
        saver = Saver(Path(top), way, alike)
        for _ in range(kills):
            child = os.fork()
            if child == 0:
                try:
                    saver.save_for_ever()
                finally:
                    os._exit(1)
            time.sleep(random.uniform(0, 2 * saver.seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcomes[saver.found()] += 1
        left = [path.name for path in saver.folder.iterdir() if path.name.startswith(".")]
        outcomes["unfinished files left in the folder", "of no consequence"] = len(left)
    return outcomes


def report(kills: int, seed: int) -> bool:
    """Kill in every way, print what was found; whether nothing was broken."""
    whole = True
    for way in ("save_pretrained", "Masks.save"):
        for alike in (True, False):
            print(f"{way}, {'the same' if alike else 'other'} modules:")
            for (state, then), count in sorted(kill(kills, seed, way, alike).items()):
                whole &= state != BROKEN
                print(f"  {count:4} x {state}: {then}")
    return whole
