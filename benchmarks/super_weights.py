"""Which single weights a decoder cannot do without, and what each is worth.

python -m examples.smollm2 smollm2
python -m benchmarks.super_weights --model smollm2 --texts DATA/ag_news/test.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import RESULTS, report, table
from benchmarks.zeros.data import packed
from benchmarks.zeros.training import loss_of, score
from peft_mask import MaskConfig, MaskLayer, super_weights

NOTE = (
    "Each weight is taken out alone. Loss is the mean negative log-likelihood in nats of {tokens:,} tokens "
    "of {texts}; the base model's is {loss:.3f}, a perplexity of {perplexity:.1f}. The weights are the {count} of the "
    "{tried} that contribute most beside the outputs of their layer, without which the loss rises by {rise} and more "
    "(`peft_mask.super_weights`). Rank: how many weights of the matrix are larger. All masked linear layers "
    "were looked at. A mask of the default's kind has scores for {candidates} of the {count}."
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the decoder")
    parser.add_argument("--texts", type=Path, required=True, help="a .jsonl of texts")
    parser.add_argument("--blocks", type=int, default=16, help="of 128 tokens")
    parser.add_argument("--tried", type=int, default=128, help="weights that are taken out")
    parser.add_argument("--rise", type=float, default=0.01, help="of the loss, for which a weight counts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = packed(options.texts, AutoTokenizer.from_pretrained(options.model), blocks=options.blocks)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), MaskConfig(task_type="CAUSAL_LM"))
    before = score(model, rows).loss
    found = super_weights(
        model, list(rows.batches(8)), lambda batch: loss_of(model, batch), rise=options.rise, tried=options.tried
    )
    figures = [
        figures_of(model, module, position, rise)
        for module, weights in found.items()
        for position, rise in weights.items()
    ]
    figures.sort(key=lambda row: -row["rise"])
    text = NOTE.format(
        tokens=rows.ids.numel(),
        texts=options.texts.parent.name,
        loss=before,
        perplexity=math.exp(before),
        count=len(figures),
        tried=options.tried,
        rise=options.rise,
        candidates=sum(row["is_candidate"] for row in figures),
    )
    header = ("module", "output, input", "value", "rank", "loss rises by", "perplexity")
    lines = [
        (
            row["module"],
            f"{row['output']}, {row['input']}",
            f"{row['value']:.3f}",
            row["rank"],
            f"{row['rise']:.3f}",
            f"{math.exp(before + row['rise']):.1f}",
        )
        for row in figures
    ]
    report("super-weights", "Super weights", f"{text}\n\n{table(header, lines)}", figures, options.results)


def figures_of(model: Any, module: str, position: int, rise: float) -> dict[str, Any]:
    layer = model.base_model.model.get_submodule(module)
    assert isinstance(layer, MaskLayer)
    weight = layer.unmerged_weight().detach()
    output, own = divmod(position, weight.shape[1])
    value = weight[output, own]
    return {
        "module": module,
        "output": output,
        "input": own,
        "value": value.item(),
        "rank": int((weight.abs() > value.abs()).sum()),
        "rise": rise,
        "is_candidate": bool(torch.isin(torch.tensor(position), layer.positions("default"))),
    }


if __name__ == "__main__":
    main()
