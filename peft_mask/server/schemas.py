"""What a request looks like, as pydantic checks it and OpenAPI shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from peft_mask.server.errors import InvalidInputError
from peft_mask.server.service import Question
from peft_mask.server.tasks.task import Task


class Pair(BaseModel):
    """A text, and maybe a second one."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str | None = None


Input = str | Pair

_MODEL = Field(description="An adapter's name, or a list with one for each input.", examples=["banking77"])
_INPUT = Field(description="A text, a pair of texts, or a list of these.", examples=["Where is my card?"])


def question_model(task: type[Task]) -> type[BaseModel]:
    """Return what a request to a task has: `model`, `input` (or what OpenAI calls it), and the task's options."""
    options: dict[str, Any] = {
        name: (type(default) | None, Field(None, description=f"By default {default}."))
        for name, default in task.options.items()
    }
    fields: dict[str, Any] = {
        "model": (str | list[str], _MODEL),
        task.input: (Input | list[Input], _INPUT),
        "user": (str | None, Field(None, description="Not used.")),
    }
    return create_model(f"{task.__name__}Request", __config__=ConfigDict(extra="forbid"), **fields, **options)


def rows_of(request: Any, task: type[Task], most: int) -> tuple[list[Question], dict[str, Any]]:
    """Return the questions of a request, one for each row, and its options. What stands once is for all rows.

    Raises:
        InvalidInputError: there are none, too many, or not as many adapters as inputs.
    """
    names: Sequence[str] = request.model if isinstance(request.model, list) else [request.model]
    given = getattr(request, task.input)
    items: Sequence[Input] = given if isinstance(given, list) else [given]
    if not names or not items:
        raise InvalidInputError(f"expected at least one model and one {task.input}, got an empty list.")
    count = max(len(names), len(items))
    if {len(names), len(items)} - {1, count}:
        raise InvalidInputError(
            f"expected one model, or one for each {task.input}: got {len(names)} models for {len(items)}."
        )
    if count > most:
        raise InvalidInputError(f"a request of {count} rows is too large: expected at most {most}.")
    plain = [item if isinstance(item, str) else item.model_dump(exclude_none=True) for item in items]
    options = {name: value for name in task.options if (value := getattr(request, name)) is not None}
    return [*zip(_times(names, count), _times(plain, count), strict=True)], options


def _times(each: Sequence[Any], count: int) -> Sequence[Any]:
    return [*each] * count if len(each) == 1 else each
