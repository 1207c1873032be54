"""The two tasks, the base model, and the floor: a linear probe on the frozen model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    set_seed,
)

from peft_mask.recipes.tagging import IGNORED, Sentence, label_last_pieces, read_columns, span_f1, token_accuracy

DATA = Path(__file__).parents[1] / "data"
METRICS = {"ud_ewt_pos": "token accuracy", "wnut17": "span F1"}
SCORES = {"token accuracy": token_accuracy, "span F1": span_f1}
PROBE_WORDS = 20_000


@dataclass(frozen=True)
class Task:
    """A task, ready for a model: sentences as word pieces, and the number of a word's tag on its last piece."""

    name: str
    metric: str
    labels: list[str]
    train: Dataset
    test: Dataset

    def score(self, predicted: Iterable[NDArray[Any]], expected: Iterable[NDArray[Any]]) -> float:
        """Score tags, given as numbers for the pieces of each sentence; `expected` says which pieces count."""
        words = [
            (row[kept], tags[kept]) for row, tags in zip(predicted, expected, strict=True) for kept in [tags != IGNORED]
        ]
        return SCORES[self.metric]([self._names(tags) for _, tags in words], [self._names(row) for row, _ in words])

    @property
    def test_words(self) -> int:
        return sum(label != IGNORED for labels in self.test["labels"] for label in labels)

    def _names(self, numbers: NDArray[Any]) -> list[str]:
        return [self.labels[number] for number in numbers]


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model that every method starts from."""

    path: str
    seed: int

    def load(self, task: Task) -> Any:
        """Load it with a new head for `task`; the head's random weights come from the seed, the same every time."""
        set_seed(self.seed)
        # No dropout, whatever the method: it is noise, and costs masks a little (docs/experiments.md).
        return AutoModelForTokenClassification.from_pretrained(
            self.path, num_labels=len(task.labels), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def collator(self) -> DataCollatorForTokenClassification:
        return DataCollatorForTokenClassification(self.tokenizer())


def load_task(name: str, model: BaseModel) -> Task:
    """Read a task from `examples/data` and encode it for the model."""
    splits = {split: read_columns(DATA / name / f"{split}.conll") for split in ("train", "test")}
    labels = sorted({tag for sentence in splits["train"] for _, tag in sentence})
    tokenizer = model.tokenizer()
    encoded = {split: encode(sentences, tokenizer, labels) for split, sentences in splits.items()}
    return Task(name, METRICS[name], labels, **encoded)


def encode(sentences: list[Sentence], tokenizer: Any, labels: list[str]) -> Dataset:
    """Turn words into pieces and tags into numbers. Nothing is cut off: every word is labelled, and scored.

    Raises:
        ValueError: if the tokenizer finds no piece in a word.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    pieces = tokenizer([[word for word, _ in sentence] for sentence in sentences], is_split_into_words=True)
    rows = []
    for row, sentence in enumerate(sentences):
        word_ids = pieces.word_ids(row)
        if missing := set(range(len(sentence))) - set(word_ids):
            raise ValueError(f"the tokenizer finds no word piece in {sentence[min(missing)][0]!a}; leave the word out.")
        rows.append(
            {
                "input_ids": pieces["input_ids"][row],
                "attention_mask": pieces["attention_mask"][row],
                "labels": label_last_pieces(word_ids, [numbers[tag] for _, tag in sentence]),
            }
        )
    return Dataset.from_list(rows)


def first_look(task: Task, base: BaseModel, sentences: int = 100) -> Callable[[Any], str]:
    """Return what says how a model does on the first test sentences, and how it tags one of them."""
    rows = task.test.select(range(min(sentences, len(task.test))))
    tokenizer, collator = base.tokenizer(), base.collator()
    example = min(rows["input_ids"], key=lambda pieces: abs(len(pieces) - 10))

    def look(model: Any) -> str:
        predicted, expected = [], []
        for batch in DataLoader(rows, batch_size=50, collate_fn=collator):
            expected.extend(batch.pop("labels").numpy())
            predicted.extend(_tags(model, batch))
        tags = _tags(model, {"input_ids": torch.tensor([example])})[0]
        tagged = " ".join(
            f"{tokenizer.convert_ids_to_tokens(piece)}/{task.labels[tag]}"
            for piece, tag in zip(example, tags, strict=True)
            if piece not in tokenizer.all_special_ids
        )
        score = task.score(predicted, expected)
        return f"  A first look, at {len(rows)} test sentences: {task.metric} {score:.2f}. One of them:\n    {tagged}"

    return look


def _tags(model: Any, batch: Any) -> NDArray[Any]:
    with torch.no_grad():
        return model(**batch).logits.argmax(-1).numpy()


class WordStates(NamedTuple):
    """What the probe sees: a state and a tag for each word, and the labels of the pieces of each sentence."""

    states: NDArray[np.float32]
    tags: NDArray[np.int64]
    labels: list[NDArray[np.int64]]


def probe_score(task: Task, model: BaseModel) -> float:
    """Return the test score of a logistic regression on the frozen model's states of the last pieces of the words.

    It learns from the first `PROBE_WORDS` words of the training data, to be quick.
    """
    train = _word_states(task.train.select(range(_sentences_of(task.train, PROBE_WORDS))), model)
    test = _word_states(task.test, model)
    # C, of 0.01 to 10, on 600 training sentences held out: .356 to .219 (wnut17), .875 to .840 (ud_ewt_pos, best .876)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100))
    with warnings.catch_warnings():
        # a floor need not be optimal to the last digit
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train.states, train.tags)
    predicted = [labels.copy() for labels in test.labels]
    remaining = iter(probe.predict(test.states))
    for row in predicted:
        kept = row != IGNORED
        row[kept] = [next(remaining) for _ in range(int(kept.sum()))]
    return task.score(predicted, test.labels)


def _sentences_of(rows: Dataset, words: int) -> int:
    """Count the sentences from the first on that have no more than so many words together."""
    lengths = [sum(label != IGNORED for label in labels) for labels in rows["labels"]]
    return int((np.cumsum(lengths) <= words).sum())


def _word_states(rows: Dataset, model: BaseModel) -> WordStates:
    backbone = AutoModel.from_pretrained(model.path).eval()
    # by length: little padding to compute
    order = sorted(range(len(rows)), key=[len(pieces) for pieces in rows["input_ids"]].__getitem__)
    states, labels = [], []
    for batch in DataLoader(rows.select(order), batch_size=64, collate_fn=model.collator()):
        expected = batch.pop("labels")
        with torch.inference_mode():
            states.append(backbone(**batch).last_hidden_state[expected != IGNORED].numpy())
        labels.extend(expected.numpy())
    tags = np.concatenate([row[row != IGNORED] for row in labels])
    return WordStates(np.concatenate(states), tags, labels)
