"""What a server asks of a task: an input -> a row of numbers -> an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_mask.server.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class Row:
    """One input, ready to be computed.

    Attributes:
        features: what the tokenizer made of it, lists without a batch dimension.
        length: how many tokens these are.
        new: how many more the answer may have.
        key: rows are computed together only if theirs are equal.
        options: what the request said beside its input.
        details: what the answer needs of the input.
    """

    features: Mapping[str, Any]
    length: int
    new: int = 0
    key: object = None
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Any = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that are computed in one call.

    Attributes:
        rows: inputs with equal keys.
        adapters: for each its adapter, or slot of one, or "__base__".
        labels: for each the names of its adapter's labels, in the order of the logits.
        inputs: what the model takes of them, padded to the longest.
    """

    rows: Sequence[Row]
    adapters: list[str]
    labels: Sequence[Sequence[str]]
    inputs: dict[str, torch.Tensor]


class Task(ABC):
    """One kind of question: how an input becomes a row, and what is answered.

    Args:
        tokenizer: that of the base model; it pads on `padding_side` from now on.
        max_length: how many tokens an input may have. By default what the tokenizer says, or else 512.

    Attributes:
        name: word for it on the command line.
        path: where an HTTP server answers it.
        task_type: PEFT's word for it.
        options: what a request may say beside its input, and the defaults.
        answers_base: whether the base alone, without an adapter, has an answer.
        padding_side: left of prompts, which answers go on with; else right, or places of tokens would depend on others.
        input: what a request calls its inputs.
        entries: what a response calls its answers.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    task_type: ClassVar[str]
    options: ClassVar[Mapping[str, object]] = {}
    answers_base: ClassVar[bool] = False
    padding_side: ClassVar[str] = "right"
    input: ClassVar[str] = "input"
    entries: ClassVar[str] = "data"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither a pad_token nor an eos_token: set one to pad batches with.")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = self.padding_side
        said = tokenizer.model_max_length
        self.tokenizer = tokenizer
        self.max_length = max_length or (said if said < 1 << 20 else 512)  # a tokenizer that does not know says 10^30

    def encode(self, item: object, options: Mapping[str, Any]) -> Row:
        """Return an input as a row.

        Args:
            item: a text, or a mapping with "text" and "text_pair".
            options: some of `options`, by name.

        Raises:
            InvalidInputError: it is no text, empty, or too long, or an option is unknown or has no meaning.
        """
        texts = _texts_of(item)
        if unknown := sorted(options.keys() - self.options.keys()):
            raise InvalidInputError(f"there is no option {unknown[0]!r} for {self.path}: {sorted(self.options)}.")
        chosen = {**self.options, **{name: value for name, value in options.items() if value is not None}}
        self.check(chosen)
        longest = 16 * self.max_length * len(texts)  # characters: who sends a book shall not have it tokenized
        if (characters := sum(map(len, texts))) > longest:
            raise InvalidInputError(f"a text of {characters} characters is too long: expected at most {longest}.")
        encoded = self.tokenizer(*texts, **self.tokenization())
        features = {name: encoded[name] for name in self.tokenizer.model_input_names if name in encoded}
        length, new = len(features["input_ids"]), self.new(chosen)
        if not length:
            raise InvalidInputError("an input is empty: the tokenizer finds nothing in it.")
        if length + new > self.max_length:
            most = self.max_length - new
            raise InvalidInputError(f"a text of {length} tokens is too long: expected at most {most}. Shorten it.")
        return Row(features, length, new, self.key(chosen), chosen, self.details(texts, encoded))

    def compute(
        self, model: nn.Module, rows: Sequence[Row], adapters: Sequence[str], labels: Sequence[Sequence[str]]
    ) -> list[Any]:
        """Return the answer of a PEFT model to each row, all computed in one call; arguments are as in `Batch`."""
        inputs = self.tokenizer.pad(
            {name: [row.features[name] for row in rows] for name in rows[0].features}, return_tensors="pt"
        ).to(device_of(model))
        with torch.inference_mode():
            return self.answers(model, Batch(rows, list(adapters), labels, dict(inputs)))

    @abstractmethod
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """Return the answer to each row of a padded batch."""

    @classmethod
    @abstractmethod
    def entry(cls, answer: Any, encoding: str | None) -> dict[str, Any]:
        """Return an answer as a response has it.

        Args:
            answer: one of `answers`.
            encoding: what the request says of it, where it can.
        """

    # ---- what some tasks do otherwise ----

    def tokenization(self) -> dict[str, Any]:
        """Return what the tokenizer is told beside the text."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 - most tasks have nothing to check
        """Refuse options that have no meaning."""

    def new(self, options: Mapping[str, Any]) -> int:
        """Return how many tokens an answer may have, which stand behind those of the input."""
        return 0

    def key(self, options: Mapping[str, Any]) -> object:
        """Return what must be equal in rows that are computed together."""
        return None

    def details(self, texts: Sequence[str], encoded: Any) -> Any:
        """Return what the answer needs of the input."""
        return None


def whole(options: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """Return an option that is a whole number within limits.

    Raises:
        InvalidInputError: it is none.
    """
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInputError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")
    return value


def check_finite(numbers: torch.Tensor) -> None:
    """Refuse an answer that is no answer, as of weights that overflow in 16 bits.

    Raises:
        ArithmeticError: one of them is infinite, or none.
    """
    if not numbers.isfinite().all():
        raise ArithmeticError("the model's answer is not finite")


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs."""
    return next(model.parameters()).device


def _texts_of(item: object) -> list[str]:
    if isinstance(item, Mapping):
        if unknown := sorted(map(str, item.keys() - {"text", "text_pair"})):
            raise InvalidInputError(f"an input has 'text' and may have 'text_pair', got {unknown[0]!r}.")
        texts = [item.get("text"), *([item["text_pair"]] if item.get("text_pair") is not None else [])]
    else:
        texts = [item]
    for text in texts:
        if not isinstance(text, str):
            raise InvalidInputError(f"an input is a text, got {type(text).__name__}.")
        if not text.strip():
            raise InvalidInputError("an input is empty: expected a text.")
    return [str(text) for text in texts]
