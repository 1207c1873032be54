"""Conversations out of files, and whether a chat template, a tokenizer and a length suit them.

Every error names the file and, where there is one, the row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from peft_mask.recipes.files import load_file

FILE_TYPES = {".csv": "table", ".tsv": "table", ".json": "json", ".jsonl": "json lines", ".parquet": "parquet"}
ROLES = ("system", "user", "assistant")
# what looks like a token: <|im_start|>, <start_of_turn>, </s>; [INST] and <<SYS>> are text by design
MARKER = re.compile(r"<\|[^<>|]+\|>|<｜[^<>｜]+｜>|(?<!<)</?\w+>(?!>)")

Message = dict[str, str]


def load_conversations(
    option: str, name: str, prompt_column: str, completion_column: str, system: str | None = None
) -> list[list[Message]]:
    """Load a file of conversations.

    A row holds `messages`, or else a question and an answer in two columns, each a text or a list of messages.

    Args:
        option: of the command line, which an error names.
        name: CSV, TSV, JSON, JSONL or Parquet file.
        prompt_column: column of the questions, if there is none called `messages`.
        completion_column: column of the answers, likewise.
        system: what a conversation begins with that has no message of the system.

    Returns:
        Lists of messages: objects with `role` and `content`. The first is never the assistant's, another is.

    Raises:
        ValueError: if the file cannot be read, it has no such columns, or a row holds something else.
        FileNotFoundError: if it does not exist.
    """
    rows = load_file(option, name, FILE_TYPES)
    source = rows.info.description
    if "messages" in rows.column_names:
        found = [as_messages(messages, "user") for messages in rows["messages"][:]]
    elif {prompt_column, completion_column} <= set(rows.column_names):
        pairs = zip(rows[prompt_column][:], rows[completion_column][:], strict=True)
        found = [as_messages(prompt, "user") + as_messages(answer, "assistant") for prompt, answer in pairs]
    else:
        raise ValueError(
            f"{source}: there is neither a column 'messages' nor both of {prompt_column!r} and {completion_column!r}, "
            f"the file has {rows.column_names}; see --prompt_column and --completion_column."
        )
    for number, messages in enumerate(found, 1):
        try:
            check_messages(messages)
            _check_answers(messages, opened=system is not None)
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from None
    start = [] if system is None else [{"role": "system", "content": system}]
    return [(start if messages[0]["role"] != "system" else []) + messages for messages in found]


def as_messages(value: Any, role: str) -> list[Any]:
    """Return a list of messages as it is, without what they lack, and a text as a message of `role`."""
    if not isinstance(value, list):
        return [{"role": role, "content": value}]
    return [
        {key: item for key, item in message.items() if item is not None} if isinstance(message, dict) else message
        for message in value
    ]


def check_messages(messages: Sequence[Any]) -> None:
    """Raise ValueError if one is no message, of an unknown role or without text."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {message!r:.60}; expected an object with 'role' and 'content'.")
        if (role := message.get("role")) not in ROLES:
            raise ValueError(
                f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)} (under the name 'role', "
                "with the text under 'content'): rename what is called otherwise, as 'human' and 'gpt' are."
            )
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"message {number}, of the {role}, has no text in 'content'; fill it in, or leave it out.")
        if more := sorted(message.keys() - {"role", "content"}):
            raise ValueError(f"message {number} has {more} beside 'role' and 'content', which would be lost.")


def _check_answers(messages: Sequence[Message], opened: bool) -> None:
    """Raise ValueError if there is no answer of the assistant, or one before any other message.

    `opened` says that a message of the system will be put before, if there is none.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no answer of the assistant, and so nothing to learn; add one, or leave the row out.")
    if messages[0]["role"] == "assistant" and not opened:
        raise ValueError(
            "the assistant speaks first, and an answer needs something before it: put a message of the user or the "
            "system there, leave this one out, or give --system."
        )


def answers_of(messages: Sequence[Message]) -> list[dict[str, list[Message]]]:
    """Return a row for each answer of a conversation: all before it as `prompt`, the answer as `completion`."""
    return [
        {"prompt": list(messages[:place]), "completion": [message]}
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def as_dataset(conversations: Sequence[Sequence[Message]]) -> Dataset:
    """Make of conversations what TRL's SFTTrainer takes, whose loss is then that of the completions alone."""
    return Dataset.from_list([row for messages in conversations for row in answers_of(messages)])


def check_markers(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> None:
    """Check that the tokenizer has a chat template, and takes each marker that it writes for one token.

    Conversations that the template refuses are left to `check_rows`.

    Raises:
        ValueError: if it has none, or splits a marker into pieces.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: name one with --chat_template_path (a file of Jinja, or a model that "
            "has one), or take a model for chats."
        )
    split: dict[str, int] = {}
    for roles in {tuple(message["role"] for message in messages) for messages in conversations}:
        messages = [{"role": role, "content": "x"} for role in roles]  # so that all else is the template's own
        try:
            text = render(tokenizer, messages, tokenize=False)
        except TemplateError:
            continue  # `check_rows` names the row
        for marker in MARKER.findall(text):
            if (pieces := tokenizer.tokenize(marker)) != [marker]:
                split[marker] = len(pieces)
    if split:
        listed = ", ".join(f"{marker!r} ({count})" for marker, count in sorted(split.items()))
        tokens = " ".join(f"'{marker}'" for marker in sorted(split))
        raise ValueError(
            f"the chat template writes what are no tokens of the tokenizer, which splits them into pieces: {listed}. "
            f"Make them tokens with --add_tokens {tokens}, or say --split_markers, if the model was trained so."
        )


def check_rows(
    source: str,
    conversations: Sequence[Sequence[Message]],
    tokenizer: Any,
    stops: Collection[int],
    max_length: int | None,
    keep_end: bool = False,
) -> int:
    """Check that each answer ends where the model stops to generate, and begins within the length.

    Args:
        source: what an error calls the rows.
        conversations: in the order of the rows.
        tokenizer: with a chat template.
        stops: ids of the tokens at which generation ends.
        max_length: number of tokens that a row is cut to.
        keep_end: whether its beginning is cut off, and not its end.

    Returns:
        How many answers are cut off.

    Raises:
        ValueError: if the template refuses a row, an answer has no such end, or nothing of an answer is left.
    """
    cut = 0
    lost: dict[int, int] = {}  # rows, and the tokens before their answers
    for number, messages in enumerate(conversations, 1):
        for row in answers_of(messages):
            try:
                before = render(tokenizer, row["prompt"], add_generation_prompt=True)
                whole = render(tokenizer, row["prompt"] + row["completion"])
            except TemplateError as error:
                raise ValueError(f"{source}: row {number}: the chat template refuses it: {error}.") from None
            # as TRL has it: a template may write the prompt differently once the answer is there
            start = len([*takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))])
            if not any(token in stops for token in whole[start:]):
                raise ValueError(
                    f"{source}: row {number}: the chat template ends an answer with "
                    f"{tokenizer.decode(whole[-3:])!r}, in which is none of the tokens at which the model stops, "
                    f"{tokenizer.convert_ids_to_tokens(sorted(stops))}: it would not learn to. Name the template's own "
                    "with --eos_token, or let the template write one."
                )
            over = 0 if max_length is None else max(len(whole) - max_length, 0)
            gone = max(over - start, 0) if keep_end else over  # tokens of the answer
            cut += gone > 0
            if gone >= len(whole) - start:
                lost.setdefault(number, start)
    if lost:
        number, start = next(iter(lost.items()))
        raise ValueError(
            f"{source}: of {len(lost)} of {len(conversations)} rows nothing of an answer is left within --max_length "
            f"{max_length}, the first is row {number}, whose answer begins after {start} tokens: raise --max_length, "
            "or leave these rows out."
        )
    return cut


def render(tokenizer: Any, messages: Sequence[Message], **settings: Any) -> Any:
    """Return what the chat template makes of messages: ids, or with `tokenize=False` a text."""
    return tokenizer.apply_chat_template(messages, return_dict=False, **settings)
