"""Do the masks of different tasks, and of different seeds, differ more in upper blocks?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_mask import MaskConfig, Masks
from peft_mask.analysis import block, dissimilarity, flip_ratio, masks_of
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import WAYS, Models
from reproduction.scale import Scale

TITLE = "Dissimilarity of masks by block"
NOTE = (
    "s = |M1 - M2| / (|M1 - start| + |M2 - start|). The default starts with every weight kept; in the paper's setting "
    "both tasks start from the same random scores. Chance: the same numbers of flips at random places, among the "
    "weights that can flip at all: with the default a tenth of them; in the paper's setting those whose score starts "
    "nearer to the threshold than the learning rate summed over the steps."
)
# recipe -> pairs of (task, seed). With another seed, trainings in the paper's setting start from other masks, and s
# would count how these differ.
PAIRS = {
    "mask": {
        "TREC and SST-2, seed 0": (("trec", 0), ("sst2", 0)),
        "TREC and SST-2, seed 1": (("trec", 1), ("sst2", 1)),
        "TREC, seeds 0 and 1": (("trec", 0), ("trec", 1)),
        "SST-2, seeds 0 and 1": (("sst2", 0), ("sst2", 1)),
    },
    "paper": {"TREC and SST-2, seed 0": (("trec", 0), ("sst2", 0))},
}


def run(models: Models, scale: Scale) -> dict[str, Any]:
    rows = []
    for way in scale.recipes:
        start = masks_of(models.untrained("trec", way, 0))
        share = _may_flip(models, way)
        for title, ((first_task, first_seed), (second_task, second_seed)) in PAIRS[way].items():
            first = masks_of(models.trained(first_task, way, first_seed))
            second = masks_of(models.trained(second_task, way, second_seed))
            chance = _chance(first, second, start, share)
            for name, value in sorted(dissimilarity(first, second, start, by=block).items()):
                row = {"recipe": way, "pair": title, "block": int(name)}
                rows.append(row | {"dissimilarity": round(value, 4), "chance": round(chance[name], 4)})
    return {"rows": rows}


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
            lines[f"{words}: {pair}"] = Line(blocks, [row["dissimilarity"] for row in rows], dashed=recipe == "paper")
    plot_lines(path, lines, "block", "dissimilarity", TITLE)
