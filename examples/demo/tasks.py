"""The demo's two tasks, and the floor under both: a linear probe on the frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from examples.text_classification import encode, label_names

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Task:
    """A task, ready for a model: rows of token ids and a number as label."""

    name: str
    labels: list[str]
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model that every method starts from."""

    path: str
    seed: int

    def load(self, task: Task) -> Any:
        """Load it with a new head for `task`; the head's random weights come from the seed, the same every time."""
        set_seed(self.seed)
        return AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=len(task.labels))

    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(AutoTokenizer.from_pretrained(self.path))


def load_task(name: str, model: BaseModel) -> Task:
    """Read a task from `examples/data` and encode it for the model."""
    files = {split: str(DATA / name / f"{split}.csv") for split in ("train", "test")}
    splits = load_dataset("csv", data_files=files)
    labels = label_names(splits["train"], "label")
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    encoded = {split: encode(splits[split], tokenizer, ["text"], "label", labels, max_length=64) for split in files}
    return Task(name, labels, **encoded)


def probe_accuracy(task: Task, model: BaseModel) -> float:
    """Return the test accuracy of a logistic regression on the mean of the frozen model's last hidden states."""
    backbone = AutoModel.from_pretrained(model.path).eval()
    features = {}
    for split in ("train", "test"):
        batches = DataLoader(getattr(task, split), batch_size=64, collate_fn=model.collator())
        features[split] = np.concatenate([_mean_pooled(backbone, batch) for batch in batches])
    probe = LogisticRegression(max_iter=1000).fit(features["train"], task.train["labels"])
    return float(probe.score(features["test"], task.test["labels"]))


def _mean_pooled(backbone: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        states = backbone(**inputs).last_hidden_state
    weights = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return ((states * weights).sum(1) / weights.sum(1)).numpy()
