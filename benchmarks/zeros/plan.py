"""What is trained: one training is a `Plan`, and a study is a list of them, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

MODULES: dict[str, tuple[str, ...] | None] = {  # what is masked; None: every linear layer of the backbone
    "all": None,
    "gate": ("gate_proj",),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class Plan:
    """One training.

    Attributes:
        data: name of the folder of what is learnt.
        method: `"base"`, `"full"`, `"LoRA"` or `"mask"`.
        rate: learning rate of full fine-tuning and LoRA; a mask has none to choose.
        modules: of a mask, a name of `MODULES`.
        sparsity: of a mask, the share of the masked weights that is off in the end.
        candidates: of a mask, the rule that says which weights have scores.
        among: of a mask, the share of weights that have scores.
        protected: of a mask, whether the weights that `super_weights` finds are kept.
    """

    data: str
    method: str
    steps: int = 0
    seed: int = 0
    rate: float = 0.0
    modules: str = ""
    sparsity: float = 0.0
    candidates: str = ""
    among: float = 0.0
    protected: bool = False

    def key(self) -> dict[str, Any]:
        """Return what tells it from all other trainings."""
        return asdict(self)


KEY = tuple(Plan("", "").key())
STEPS = {"banking77": 100, "clinc150": 100}
LONGER = 1000
RATES = {"full": (3e-4, 1e-4), "LoRA": (3e-3, 1e-3)}  # those around the best of benchmarks.decoder


def mask(data: str, modules: str, sparsity: float, candidates: str = "magnitude", **other: Any) -> Plan:
    fields = {"steps": STEPS[data], "among": 0.1, **other}
    return Plan(data, "mask", modules=modules, sparsity=sparsity, candidates=candidates, **fields)


def rivals(data: str) -> Iterator[Plan]:
    yield Plan(data, "base")
    for method, rates in RATES.items():
        for rate in rates:
            yield Plan(data, method, STEPS[data], rate=rate)


def modules(data: str) -> Iterator[Plan]:
    """Modules and budgets; gate and attention are a quarter of all weights each, so 2 % of one takes 0.5 % of all."""
    for name, sparsity in (
        ("all", 0.005),
        ("gate", 0.02),
        ("gate", 0.002),
        ("all", 0.0005),
        ("attention", 0.02),
        ("attention", 0.002),
        ("all", 0.002),
        ("gate", 0.008),
        ("attention", 0.008),
        ("gate", 0.005),
        ("attention", 0.005),
        ("all", 0.001),
    ):
        yield mask(data, name, sparsity)


def candidates(data: str) -> Iterator[Plan]:
    """Rules for which weights have scores, and super weights that are kept."""
    for name, sparsity in (("all", 0.002), ("gate", 0.008)):
        for rule in ("off-principal", "activation", "random", "low rank", "off the low rank", "activation, smallest"):
            yield mask(data, name, sparsity, rule)
    yield mask(data, "all", 0.002, protected=True)


def longer(data: str) -> Iterator[Plan]:
    """Ten times the steps: whether larger masks close what is left to full fine-tuning."""
    for rate in RATES["full"]:
        yield Plan(data, "full", LONGER, rate=rate)
    yield mask(data, "all", 0.002, "off-principal", steps=LONGER)
    for sparsity, among in ((0.005, 0.1), (0.02, 0.2), (0.002, 0.1), (0.05, 0.5), (0.01, 0.1)):
        yield mask(data, "all", sparsity, among=among, steps=LONGER)


STUDIES: dict[str, Callable[[str], Iterator[Plan]]] = {"modules": modules, "candidates": candidates, "longer": longer}


def of_seeds(plans: Iterator[Plan], seeds: tuple[int, ...]) -> Iterator[Plan]:
    for plan, seed in product(list(plans), seeds):
        yield Plan(**{**plan.key(), "seed": seed})
