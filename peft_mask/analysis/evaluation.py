"""What a model says of a data set, and how often it is right: also of data it was not trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
IGNORED = -100  # a label that does not count


@torch.inference_mode()
def logits_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Compute the logits of all examples; of a tagger, of all tokens with a label.

    Args:
        model: a model whose output has `logits` of shape (examples, classes), or (examples, tokens, classes) for labels
            of shape (examples, tokens); it is put into eval mode.
        batches: keyword arguments of the model; `labels` are not given to it.

    Returns:
        float32 of shape (examples, classes), or (labelled tokens, classes), on the CPU, in the order of the batches.

    Raises:
        ValueError: if the model classifies neither examples nor tokens, or there are none.
    """
    model.eval()
    found = []
    for batch in batches:
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        if _are_tags(logits, batch.get("labels"), model):
            logits = logits[batch["labels"] != IGNORED]
        if logits.dim() != 2:
            raise ValueError(
                "expected logits of shape (examples, classes), or of a tagger (examples, tokens, classes) with a label "
                f"a token, got {tuple(logits.shape)}."
            )
        found.append(logits.float().cpu())
    if not found:
        raise ValueError("there are no batches to evaluate.")
    return torch.cat(found)


def labels_of(batches: Iterable[Batch]) -> Tensor:
    """Return the labels of all examples, of a tagger of all tokens with one: int64, on the CPU, in that order."""
    found = [batch["labels"].cpu() for batch in batches]
    return torch.cat([labels if labels.dim() == 1 else labels[labels != IGNORED] for labels in found])


def _are_tags(logits: Tensor, labels: Tensor | None, model: nn.Module) -> bool:
    """Whether there is a label a token; a language model has as many, but its classes are words, and it shifts them."""
    classes = getattr(getattr(model, "config", None), "num_labels", logits.shape[-1])
    return labels is not None and labels.dim() == 2 and logits.shape == (*labels.shape, classes)


def share_right(predicted: Tensor, labels: Tensor) -> float:
    """Return the fraction of examples whose label was predicted; labels of -100 do not count."""
    counted = labels != IGNORED
    return float((predicted == labels)[counted].double().mean())


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the fraction of examples that a classifier gets right.

    Args:
        model: as for `logits_of`.
        batches: keyword arguments of the model with `labels`, in a sequence: they are gone through twice.

    Raises:
        ValueError: as of `logits_of`.
    """
    return share_right(logits_of(model, batches).argmax(-1), labels_of(batches))


def generalization(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]], datasets: Mapping[str, Sequence[Batch]]
) -> list[dict[str, Any]]:
    """Score each model on each data set, also on those it was not trained for.

    Args:
        models: by the name of what they were trained on: a model, or a function that makes it when its turn comes.
        datasets: batches with `labels` by name. Labels mean the same everywhere (0 is negative in both, say).

    Returns:
        A row a pair: `model`, `dataset`, `accuracy`, `majority` (the share of the most common label) and `gain`, the
        accuracy above that.

    Raises:
        ValueError: if a data set has labels that a model cannot predict, which makes the labels' meaning different.

    Source: the generalization of Zhao et al. 2020, models of one data set on another's development examples.
    """
    rows = []
    for name, made in models.items():
        model = made if isinstance(made, nn.Module) else made()
        for dataset, batches in datasets.items():
            logits, labels = logits_of(model, batches), labels_of(batches)
            if labels.max() >= logits.shape[1]:
                raise ValueError(
                    f"'{dataset}' has labels up to {int(labels.max())}, the model of '{name}' predicts "
                    f"{logits.shape[1]} classes: they are different tasks."
                )
            counted = labels[labels != IGNORED]
            majority = float(counted.bincount().max()) / len(counted)
            score = share_right(logits.argmax(-1), labels)
            row = {"model": name, "dataset": dataset, "accuracy": score, "majority": majority}
            rows.append(row | {"gain": score - majority})
    return rows
