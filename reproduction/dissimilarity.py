"""Do the masks of different tasks, and of different seeds, differ more in upper blocks?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_mask import MaskConfig, Masks
from peft_mask.analysis import block, dissimilarity, flip_ratio, masks_of
from peft_mask.analysis.plots import Line, plot_lines
from reproduction.models import Models
from reproduction.scale import Scale

TITLE = "Dissimilarity of masks by block"
NOTE = (
    "s = |M1 - M2| / (|M1 - start| + |M2 - start|). Chance: what flips at random places would give, as many as there "
    "were, among the weights that may flip (a tenth in the default, all in the paper's setting). In the paper's "
    "setting trainings of one seed start from the same random mask; those of two seeds do not, so that there s also "
    "counts how the starts differ."
)
TASKS, SEEDS = ("trec", "sst2"), (0, 1)


def run(models: Models, scale: Scale) -> dict[str, Any]:
    rows = []
    for way in ("mask", "paper"):
        masks = {(task, seed): masks_of(models.trained(task, way, seed)) for task in TASKS for seed in SEEDS}
        starts = {seed: masks_of(models.untrained("trec", way, seed)) for seed in SEEDS}
        pairs = {f"TREC and SST-2, seed {seed}": (("trec", seed), ("sst2", seed)) for seed in SEEDS}
        pairs |= {f"{task}, seeds 0 and 1": ((task, 0), (task, 1)) for task in TASKS}
        for title, (first, second) in pairs.items():
            found = dissimilarity(masks[first], masks[second], starts[first[1]], starts[second[1]], block)
            chance = _chance(way, masks[first], masks[second], starts[first[1]], starts[second[1]])
            rows += [
                {
                    "recipe": way,
                    "pair": title,
                    "block": int(name),
                    "dissimilarity": round(value, 4),
                    "chance": round(chance[name], 4) if first[1] == second[1] or way == "mask" else None,
                }
                for name, value in sorted(found.items())
            ]
    return {"rows": rows}


def _chance(way: str, first: Masks, second: Masks, first_start: Masks, second_start: Masks) -> dict[str, float]:
    """1 - 2 k1 k2 / (c (k1 + k2)) for k1 and k2 flips at random among c weights."""
    share = MaskConfig().candidates if way == "mask" else 1.0  # of the weights, that may flip
    assert share is not None
    flips = flip_ratio(first, first_start, block), flip_ratio(second, second_start, block)
    return {
        name: 1 - 2 * flips[0][name] * flips[1][name] / (share * (flips[0][name] + flips[1][name])) for name in flips[0]
    }


def draw(result: dict[str, Any], path: Path) -> None:
    lines = {}
    for recipe, words in (("mask", "default"), ("paper", "paper's setting")):
        of = [row for row in result["rows"] if row["recipe"] == recipe]
        for pair in dict.fromkeys(row["pair"] for row in of):
            if recipe == "paper" and "seeds" in pair:
                continue  # other starts: above one, another question
            rows = [row for row in of if row["pair"] == pair]
            lines[f"{words}: {pair}"] = Line(
                [row["block"] for row in rows], [row["dissimilarity"] for row in rows], dashed=recipe == "paper"
            )
    plot_lines(path, lines, "block", "dissimilarity", TITLE)
