"""Tagging words: parts of speech, named entities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peft_mask.server.errors import InvalidInputError
from peft_mask.server.tasks.task import Batch, Row, Task, check_finite


class Tagging(Task):
    """A label for each word of a text.

    A word is what the tokenizer takes for one, and has the label of its first token, as in the training scripts. An
    answer has `words`, each with `word`, `label`, `score`, `start` and `end` (places in the text), and, where an
    adapter's labels are `B-` and `I-` something, `entities`: neighbors of the same kind as one.
    """

    name = "tag"
    path = "/v1/tag"
    task_type = "TOKEN_CLS"

    def tokenization(self) -> dict[str, Any]:
        if not self.tokenizer.is_fast:
            raise InvalidInputError("this base has a slow tokenizer, which does not tell where words are.")
        return {"return_offsets_mapping": True}

    def details(self, texts: Sequence[str], encoded: Any) -> Any:
        if len(texts) > 1:
            raise InvalidInputError("a text to tag has no text_pair.")
        words: dict[int, tuple[int, int, int]] = {}  # word -> its first token, start, end
        for token, (word, (start, end)) in enumerate(zip(encoded.word_ids(), encoded["offset_mapping"], strict=True)):
            if word is not None:
                first, begin, _ = words.setdefault(word, (token, start, end))
                words[word] = first, begin, end
        return texts[0], [*words.values()]

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        logits = model(**batch.inputs, adapter_names=batch.adapters).logits.float().cpu()
        return [
            _tagged(row, logits[number, :, : len(own)].softmax(-1), own)
            for number, (row, own) in enumerate(zip(batch.rows, batch.labels, strict=True))
        ]

    @classmethod
    def entry(cls, answer: Any, encoding: str | None) -> dict[str, Any]:
        return dict(answer)


def _tagged(row: Row, scores: torch.Tensor, labels: Sequence[str]) -> dict[str, Any]:
    text, words = row.details
    check_finite(scores)
    best, places = scores[[first for first, _, _ in words]].max(-1) if words else (scores[:0, 0], scores[:0, 0])
    found = [
        {"word": text[start:end], "label": labels[int(place)], "score": score, "start": start, "end": end}
        for (_, start, end), score, place in zip(words, best.tolist(), places.tolist(), strict=True)
    ]
    if any(label.startswith(("B-", "I-")) for label in labels):
        return {"words": found, "entities": entities_of(text, found)}
    return {"words": found}


def entities_of(text: str, words: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return runs of words of one kind: `B-` begins one, `I-` goes on with its kind's, or begins one without it.

    The score is the lowest of its words'.
    """
    found: list[dict[str, Any]] = []
    previous = "O"
    for word in words:
        label = word["label"]
        prefix, _, kind = label.partition("-")
        if prefix == "I" and previous.partition("-")[2] == kind:
            found[-1]["end"] = word["end"]
            found[-1]["score"] = min(found[-1]["score"], word["score"])
        elif prefix in ("B", "I") and kind:
            found.append({"label": kind, "score": word["score"], "start": word["start"], "end": word["end"]})
        else:
            label = "O"
        previous = label
    return [{"text": text[entity["start"] : entity["end"]], **entity} for entity in found]
