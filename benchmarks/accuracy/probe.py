"""The floor: logistic regression on frozen features."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from transformers import AutoModel

from benchmarks.accuracy.tasks import IGNORED, Rows, Split, Task, training_batches
from benchmarks.accuracy.training import Setting


@dataclass(frozen=True)
class Probe:
    """A row of the table of methods: a linear classifier on the mean of a text's last hidden states, or on the last
    hidden state of a word's last piece.

    It is fitted to the rows that the other methods see in their budget with this seed; what dev chooses is C, the
    inverse of the regularization. Only the rows depend on the seed, so one seed is run.
    """

    name: str = "probe"
    note: str = "logistic regression on standardized frozen features (texts: mean over pieces; words: last piece)"
    lrs: tuple[float, ...] = (0.001, 0.01, 0.1)


def train(
    task: Task, method: Probe, lr: float, seed: int, steps: int, setting: Setting, state: Path | None = None
) -> dict[str, Any]:
    """Fits once with C = `lr`, scores dev; never reads test. The probe goes to `state`."""
    rows = setting.rows(task, "train")
    seen = np.unique([i for batch in training_batches(rows, seed, steps, setting.batch_size) for i in batch])
    features, labels, owners, seconds = _features(task, "train", setting)
    start = time.perf_counter()
    used = np.isin(owners, seen)
    x, y = features[used], labels[used]
    mean, scale = x.mean(0), x.std(0) + 1e-6
    fit = LogisticRegression(C=lr, max_iter=1000, tol=1e-3).fit((x - mean) / scale, y)
    seconds += time.perf_counter() - start
    # Labels that the rows do not show are never predicted; with two classes sklearn keeps the second's weights only.
    weight, bias = fit.coef_, fit.intercept_
    if len(fit.classes_) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    tensors = {
        "weight": np.ascontiguousarray(weight, np.float32),
        "bias": np.ascontiguousarray(bias - weight @ mean, np.float32),
        "classes": fit.classes_.astype(np.int64),
    }
    size = tensors["weight"].nbytes + tensors["bias"].nbytes
    if state is not None:
        save_file(tensors, state)
    return {
        "dev": _accuracy(task, "dev", setting, tensors),
        "train_seconds": round(seconds, 2),
        "trained_parameters": size // 4,
        "bytes": size,
        "head_bytes": size,
    }


def score_test(task: Task, method: Probe, seed: int, setting: Setting, state: Path) -> float:
    """The test accuracy of the probe that `train` left in `state`."""
    return _accuracy(task, "test", setting, load_file(state))


def _accuracy(task: Task, split: Split, setting: Setting, probe: dict[str, NDArray[Any]]) -> float:
    features, labels, _, _ = _features(task, split, setting)
    predicted = probe["classes"][(features @ probe["weight"].T + probe["bias"]).argmax(1)]
    return int((predicted == labels).sum()) / setting.rows(task, split).labelled


@lru_cache(maxsize=3)
def _features(
    task: Task, split: Split, setting: Setting
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], float]:
    """For each text or word its feature vector, its label and the row it stands in; and the seconds it took."""
    start = time.perf_counter()
    rows: Rows = setting.rows(task, split)
    model = AutoModel.from_pretrained(setting.model).eval()
    features, labels, owners = [], [], []
    order = sorted(range(len(rows.pieces)), key=lambda i: len(rows.pieces[i]))
    with torch.inference_mode():
        for first in range(0, len(order), 64):
            indices = np.array(order[first : first + 64])
            batch = rows.batch(indices.tolist())
            label, attention = batch.pop("labels"), batch["attention_mask"]
            states = model(**batch).last_hidden_state
            if task.task_type == "SEQ_CLS":
                features.append(((states * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)).numpy())
                labels.append(label.numpy())
                owners.append(indices)
            else:
                row, _ = where = torch.nonzero(label != IGNORED, as_tuple=True)
                features.append(states[where].numpy())
                labels.append(label[where].numpy())
                owners.append(indices[row.numpy()])
    seconds = time.perf_counter() - start
    return np.concatenate(features), np.concatenate(labels), np.concatenate(owners), seconds
