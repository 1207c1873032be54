"""Do the masks of different tasks, and of different seeds, differ more in upper blocks?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from peft_mask import MaskConfig, Masks
from peft_mask.analysis import block, dissimilarity, flip_ratio, masks_of
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import WAYS, Models
from reproduction.scale import Scale
from reproduction.seeds import bars, over_seeds

TITLE = "Dissimilarity of masks by block"
NOTE = (
    "s = |M1 - M2| / (|M1 - start| + |M2 - start|). The default starts with every weight kept; in the paper's setting "
    "both tasks start from the same random scores. Chance: the same numbers of flips at random places, among the "
    "weights that can flip at all: with the default a tenth of them; in the paper's setting those whose score starts "
    "nearer to the threshold than the learning rate summed over the steps. Means over pairs of trainings."
)


def pairs(way: str, seeds: Sequence[int]) -> dict[str, list[tuple[tuple[str, int], tuple[str, int]]]]:
    """Trainings to compare, as (task, seed), by what the two of a pair differ in."""
    found = {"TREC and SST-2, one seed": [(("trec", seed), ("sst2", seed)) for seed in seeds]}
    if way == "mask":
        for task, title in (("trec", "TREC"), ("sst2", "SST-2")):
            found[f"{title}, two seeds"] = [((task, one), (task, other)) for one, other in combinations(seeds, 2)]
    # with another seed, trainings in the paper's setting start from other masks, and s would count how these differ
    return {title: each for title, each in found.items() if each}


def run(models: Models, scale: Scale) -> dict[str, Any]:
    rows = []
    for way in scale.recipes:
        starts = {seed: masks_of(models.untrained("trec", way, seed)) for seed in scale.seeds}
        masks = {
            (task, seed): masks_of(models.trained(task, way, seed)) for task in ("trec", "sst2") for seed in scale.seeds
        }
        share = _may_flip(models, way)
        for title, of_seeds in pairs(way, scale.seeds).items():
            compared = [(masks[one], masks[other], starts[one[1]]) for one, other in of_seeds]
            found = [dissimilarity(*each, by=block) for each in compared]
            chances = [_chance(*each, share) for each in compared]
            for name in sorted(found[0], key=int):
                row = {"recipe": way, "pair": title, "pairs": len(of_seeds), "block": int(name)}
                row |= over_seeds("dissimilarity", [values[name] for values in found])
                rows.append(row | {"chance": round(mean(values[name] for values in chances), 4)})
    return {"rows": rows, "seeds": len(scale.seeds)}


def _may_flip(models: Models, way: str) -> float:
    """Fraction of the weights that can flip, about."""
    if way == "mask":
        share = MaskConfig().candidates
        assert share is not None
        return share
    # scores start as U(-a - tau, s - tau), and Adam moves none by more than about the learning rate a step; warm-up and
    # decay make half of it on average
    config, run = MaskConfig.paper(), models.run("trec", way, 0)
    below = 0.02 + config.threshold
    assert config.init_sparsity is not None
    reach = WAYS[way][1] * run.steps / 2
    return min(1.0, (min(reach, below) + reach) / (below / config.init_sparsity))


def _chance(first: Masks, second: Masks, start: Masks, share: float) -> dict[str, float]:
    """1 - 2 k1 k2 / (c (k1 + k2)) for k1 and k2 flips at random among c weights."""
    flips = flip_ratio(first, start, block), flip_ratio(second, start, block)
    return {
        name: 1 - 2 * flips[0][name] * flips[1][name] / max(share * (flips[0][name] + flips[1][name]), 1e-12)
        for name in flips[0]
    }


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for recipe, words in (("mask", "default"), ("paper", "paper's setting")):
        of = [row for row in result["rows"] if row["recipe"] == recipe]
        for pair in dict.fromkeys(row["pair"] for row in of):
            rows = [row for row in of if row["pair"] == pair]
            blocks = [row["block"] for row in rows]
            values = [row["dissimilarity"] for row in rows]
            lines[f"{words}: {pair}"] = Line(blocks, values, dashed=recipe == "paper", error=bars(rows))
    plot_lines(path, lines, "block", "dissimilarity", TITLE)
