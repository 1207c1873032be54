"""Classifying texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_mask.server.tasks.task import Batch, Task, check_finite, whole


class Classification(Task):
    """Which of an adapter's labels a text has, the likeliest first.

    An answer is a list of `{"label", "score"}`, as that of transformers' pipeline: `top_k` of them. Scores are a
    softmax over the labels, or a sigmoid of each where the model says `problem_type="multi_label_classification"`, or
    the bare number of a regression.
    """

    name = "classify"
    path = "/v1/classify"
    task_type = "SEQ_CLS"
    options = {"top_k": 1}  # noqa: RUF012 - nobody writes into it

    def check(self, options: Mapping[str, Any]) -> None:
        whole(options, "top_k", 1, 10_000)

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        logits = model(**batch.inputs, adapter_names=batch.adapters).logits.float().cpu()
        kind = getattr(model.config, "problem_type", None)
        return [
            _ranked(logits[number, : len(own)], own, row.options["top_k"], kind)
            for number, (row, own) in enumerate(zip(batch.rows, batch.labels, strict=True))
        ]

    @classmethod
    def entry(cls, answer: Any, encoding: str | None) -> dict[str, Any]:
        return {"labels": answer}


def scores_of(logits: torch.Tensor, kind: str | None) -> torch.Tensor:
    """Return logits as scores; `kind` is what transformers calls `problem_type`."""
    if kind == "regression" or (kind is None and logits.shape[-1] == 1):
        return logits
    return logits.sigmoid() if kind == "multi_label_classification" else logits.softmax(-1)


def _ranked(logits: torch.Tensor, labels: Sequence[str], top_k: int, kind: str | None) -> list[dict[str, Any]]:
    scores, order = scores_of(logits, kind).sort(descending=True, stable=True)
    check_finite(scores)
    best = zip(scores[:top_k].tolist(), order[:top_k].tolist(), strict=True)
    return [{"label": labels[place], "score": score} for score, place in best]
