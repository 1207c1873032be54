"""Going on with texts, token by token, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_mask.server.errors import InvalidInputError
from peft_mask.server.tasks.task import Batch, Row, Task, whole


class Generation(Task):
    """How an adapter goes on with a text.

    An answer has `text`, `finish_reason` ("stop" or "length"), `prompt_tokens` and `completion_tokens`. With
    `temperature=0` the likeliest token is taken each time. A batch runs until its last row is done; for many users of a
    large model take vLLM (docs/vllm.md).

    Args:
        tokenizer: that of the base model; it pads on the left from now on.
        max_length: how many tokens prompt and answer may have together.
        max_new_tokens: how many of these an answer may have.
        max_seconds: for how long a batch is computed; an answer that is not done then ends there, with "length".
    """

    name = "generate"
    path = "/v1/completions"
    task_type = "CAUSAL_LM"
    options = {"max_tokens": 32, "temperature": 0.0, "top_p": 1.0}  # noqa: RUF012 - nobody writes into it
    answers_base = True
    padding_side = "left"
    input = "prompt"
    entries = "choices"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_new_tokens: int = 512,
        max_seconds: float = 60.0,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.max_new_tokens, self.max_seconds = min(max_new_tokens, self.max_length - 1), max_seconds

    def check(self, options: Mapping[str, Any]) -> None:
        whole(options, "max_tokens", 1, self.max_new_tokens)
        for name, low, high in (("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0)):
            value = options[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidInputError(f"{name} must be a number from {low} to {high}, got {value!r}.")
        if options["top_p"] == 0:
            raise InvalidInputError("top_p must be above 0: it is the share of likely tokens that is drawn from.")

    def new(self, options: Mapping[str, Any]) -> int:
        return int(options["max_tokens"])

    def key(self, options: Mapping[str, Any]) -> object:
        return float(options["temperature"]), float(options["top_p"])

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        prompts, options = batch.inputs["input_ids"], batch.rows[0].options
        sampling = {name: options[name] for name in ("temperature", "top_p")} if options["temperature"] else {}
        tokens = model.generate(
            input_ids=prompts,
            attention_mask=batch.inputs["attention_mask"],
            adapter_names=batch.adapters,
            max_new_tokens=max(row.new for row in batch.rows),
            max_time=self.max_seconds,
            do_sample=bool(sampling),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        new = tokens[:, prompts.shape[1] :].cpu().tolist()
        ends = _ends_of(model)
        return [self._answer(row, own, ends) for row, own in zip(batch.rows, new, strict=True)]

    def _answer(self, row: Row, tokens: list[int], ends: frozenset[int]) -> dict[str, Any]:
        tokens = tokens[: row.new]
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[:end]
        return {
            "text": self.tokenizer.decode(kept, skip_special_tokens=True),
            "finish_reason": "length" if end is None else "stop",
            "prompt_tokens": row.length,
            "completion_tokens": len(kept),
        }

    @classmethod
    def entry(cls, answer: Any, encoding: str | None) -> dict[str, Any]:
        return dict(answer)


def _ends_of(model: Any) -> frozenset[int]:
    said = model.generation_config.eos_token_id
    return frozenset([] if said is None else [said] if isinstance(said, int) else said)
