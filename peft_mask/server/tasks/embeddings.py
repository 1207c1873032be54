"""Embeddings: a vector for each text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_mask.server.errors import InvalidInputError
from peft_mask.server.tasks.task import Batch, Task, check_finite

Pooling = Literal["mean", "cls", "last"]


class Embeddings(Task):
    """The hidden states of a text, pooled to one vector.

    An answer is a list of floats of length 1, or as the base gives it if not `normalize`.

    Args:
        tokenizer: that of the base model.
        max_length: how many tokens a text may have.
        pooling: the mean over the text's tokens, the first token's state (`"cls"`), or the last one's.
        normalize: whether vectors have length 1, as those of OpenAI's servers.
    """

    name = "embed"
    path = "/v1/embeddings"
    task_type = "FEATURE_EXTRACTION"
    answers_base = True
    options = {"encoding_format": "float"}  # noqa: RUF012 - nobody writes into it

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(tokenizer, max_length)
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {list(get_args(Pooling))}, got {pooling!r}.")
        self.pooling, self.normalize = pooling, normalize

    def check(self, options: Mapping[str, Any]) -> None:
        if options["encoding_format"] not in ("float", "base64"):
            raise InvalidInputError(f"encoding_format must be float or base64, got {options['encoding_format']!r}.")

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        states = model(**batch.inputs, adapter_names=batch.adapters).last_hidden_state.float()
        vectors = pooled(states, batch.inputs["attention_mask"], self.pooling)
        if self.normalize:
            vectors = nn.functional.normalize(vectors, dim=-1)
        check_finite(vectors)
        return vectors.cpu().tolist()

    @classmethod
    def entry(cls, answer: Any, encoding: str | None) -> dict[str, Any]:
        if encoding == "base64":  # what OpenAI's client asks for: little-endian float32
            answer = base64.b64encode(np.asarray(answer, dtype="<f4").tobytes()).decode()
        return {"object": "embedding", "embedding": answer}


def pooled(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector for each row of (rows, tokens, width) states, whichever side is padded."""
    if pooling == "mean":
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)
    places = torch.arange(attention_mask.shape[1], device=states.device)
    if pooling == "cls":
        chosen = torch.where(attention_mask.bool(), places, places.numel()).argmin(1)
    else:
        chosen = torch.where(attention_mask.bool(), places, -1).argmax(1)
    return states[torch.arange(len(states), device=states.device), chosen]
