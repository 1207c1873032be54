"""Learn a mask for extractive question answering, in the shape of SQuAD, with any encoder.

    python -m examples.question_answering --model_name_or_path bert-base-uncased \
        --dataset_name rajpurkar/squad --output_dir out

    python -m examples.question_answering --model_name_or_path bert-base-uncased \
        --train_file train.jsonl --validation_file dev.jsonl --version_2_with_negative --output_dir out

A local file is one of SQuAD's own, or has the columns of `datasets`' SQuAD: `question`, `context` and `answers`, which
holds the lists `text` and `answer_start` (both empty if the context does not say). Printed are SQuAD's exact match and
F1 in per cent. Every argument of `transformers.TrainingArguments` works.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer

from peft_mask.recipes import launched
from peft_mask.recipes.rows import check_filled, check_texts, is_file, source_of
from peft_mask.recipes.script import ScriptArguments, Task, choose_test_split, run, used_splits

COLUMNS = ("question", "context", "answers")


@dataclass
class AnswerArguments(ScriptArguments):
    """The arguments of this script."""

    max_seq_length: int = field(default=384, metadata={"help": "Tokens of question and context together."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two windows of a long context share."})
    n_best_size: int = field(default=20, metadata={"help": "Starts and ends that are looked at."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some contexts do not hold the answer."})


def flat(rows: Dataset) -> Dataset:
    """Return a row for each question of SQuAD's own files, which have paragraphs; other rows as they are.

    Raises:
        ValueError: if the paragraphs are not those of SQuAD.
    """
    if "paragraphs" not in rows.column_names:
        return rows
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    try:
        for paragraph in (paragraph for article in rows for paragraph in article["paragraphs"]):
            for question in paragraph["qas"]:
                found["question"].append(question["question"])
                found["context"].append(paragraph["context"])
                answers = question["answers"] or []
                found["answers"].append({key: [answer[key] for answer in answers] for key in ("text", "answer_start")})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{source_of(rows)}: expected paragraphs as in SQuAD, with 'context' and 'qas' ({error})."
        ) from None
    flattened = Dataset.from_dict(found)
    flattened.info.description = rows.info.description
    return flattened


def check_questions(rows: Dataset) -> None:
    """Check that every row has a question, a context and answers; that those of a file stand where they say.

    Raises:
        ValueError: if a column is missing, or a row is not so.
    """
    check_filled(rows, COLUMNS)
    check_texts(rows, COLUMNS[:2])
    for number, row in enumerate(rows, 1):
        where, answers = f"{source_of(rows)}: row {number}: column 'answers'", row["answers"]
        lists = [answers.get(name) for name in ("text", "answer_start")] if isinstance(answers, dict) else [None]
        kinds = [[type(value) for value in values] if isinstance(values, list) else None for values in lists]
        if None in kinds or kinds != [[kind] * len(lists[0]) for kind in (str, int)]:
            raise ValueError(
                f"{where}: expected an object with the lists 'text', of texts, and 'answer_start', of as many whole "
                f"numbers, found {answers!r:.80}."
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=True) if is_file(rows) else ():
            if (found := row["context"][start : start + len(text)]) != text:
                raise ValueError(
                    f"{where}: at character {start} of the context expected {text!r:.60}, found {found!r:.60}."
                )


def windows(rows: dict[str, list[Any]], tokenizer: Any, max_length: int, stride: int) -> Any:
    """Tokenize questions with their contexts, a long context as several windows that overlap."""
    return tokenizer(
        [question.lstrip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def context_tokens(encoded: Any, window: int) -> tuple[int, int]:
    """Return the first token of the context in a window, and the one after the last."""
    sequences = encoded.sequence_ids(window)
    first = sequences.index(1)
    return first, first + sequences.count(1)


def answer_tokens(
    offsets: Sequence[tuple[int, int]], tokens: tuple[int, int], answers: dict[str, list[Any]]
) -> tuple[int, int]:
    """Return the first and the last token of the first answer; both 0, that is [CLS], if the window does not hold it.

    Args:
        offsets: for each token the characters it stands for: the first, and the one after the last.
        tokens: first token of the context, and the one after the last.
        answers: its `text` and `answer_start`, in characters of the context.
    """
    first, after = tokens
    if not answers["answer_start"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    if offsets[first][0] > start or offsets[after - 1][1] < end:
        return 0, 0
    begin = max(token for token in range(first, after) if offsets[token][0] <= start)
    return begin, min(token for token in range(begin, after) if offsets[token][1] >= end)


def encode_train(rows: dict[str, list[Any]], tokenizer: Any, arguments: AnswerArguments) -> dict[str, list[Any]]:
    """Turn rows into windows with the place of the answer in each."""
    encoded = windows(rows, tokenizer, arguments.max_seq_length, arguments.doc_stride)
    of, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    places = [
        answer_tokens(offsets[window], context_tokens(encoded, window), rows["answers"][row])
        for window, row in enumerate(of)
    ]
    return {**encoded, "start_positions": [start for start, _ in places], "end_positions": [end for _, end in places]}


def encode_test(
    rows: dict[str, list[Any]], numbers: list[int], tokenizer: Any, arguments: AnswerArguments
) -> dict[str, list[Any]]:
    """Turn rows into windows that know which row they are of, and which characters their tokens stand for."""
    encoded = windows(rows, tokenizer, arguments.max_seq_length, arguments.doc_stride)
    of = encoded.pop("overflow_to_sample_mapping")
    spans = [context_tokens(encoded, window) for window in range(len(of))]
    return {**encoded, "row": [numbers[row] for row in of], "context_tokens": [list(span) for span in spans]}


def best_span(
    starts: NDArray[Any], ends: NDArray[Any], tokens: Sequence[int], n_best: int, longest: int
) -> tuple[float, int, int]:
    """Return the score, the first and the last token of the span in the context with the largest sum of logits.

    Args:
        starts: logits of a window's tokens to be the first of the answer.
        ends: logits to be the last.
        tokens: first token of the context, and the one after the last.
        n_best: so many of the best starts and of the best ends are looked at; the best token alone if none fit.
        longest: tokens that a span may have.
    """
    first, after = tokens
    likely_starts, likely_ends = (first + np.argsort(-logits[first:after])[:n_best] for logits in (starts, ends))
    spans = [(s, e) for s in likely_starts for e in likely_ends if s <= e < s + longest] or [(likely_starts[0],) * 2]
    start, end = max(spans, key=lambda span: starts[span[0]] + ends[span[1]])
    return float(starts[start] + ends[end]), int(start), int(end)


def answers_of(
    starts: NDArray[Any], ends: NDArray[Any], encoded: Dataset, contexts: Sequence[str], arguments: AnswerArguments
) -> list[str]:
    """Return the answer to each question: the best span of all windows of its context, as it is written there.

    With `version_2_with_negative` the answer is empty where every window has a larger sum of logits at [CLS].
    """
    best = [(-np.inf, "")] * len(contexts)
    none = [np.inf] * len(contexts)
    for start_logits, end_logits, window in zip(starts, ends, encoded, strict=True):
        row, offsets = window["row"], window["offset_mapping"]
        score, start, end = best_span(
            start_logits, end_logits, window["context_tokens"], arguments.n_best_size, arguments.max_answer_length
        )
        if score > best[row][0]:
            best[row] = score, contexts[row][offsets[start][0] : offsets[end][1]]
        none[row] = min(none[row], float(start_logits[0] + end_logits[0]))
    return [
        "" if arguments.version_2_with_negative and empty > score else text
        for (score, text), empty in zip(best, none, strict=True)
    ]


def normalized(answer: str) -> list[str]:
    """Return the words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def word_f1(answer: str, gold: str) -> float:
    """Return the F1 of the words of an answer; of an empty one, whether both are."""
    found, expected = normalized(answer), normalized(gold)
    if not found or not expected:
        return float(found == expected)
    return 2 * sum((Counter(found) & Counter(expected)).values()) / (len(found) + len(expected))


def squad_scores(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's exact match and F1 in per cent, each against the best of the answers that count as right."""
    exact, f1 = [], []
    for answer, right in zip(answers, golds, strict=True):
        exact.append(max(normalized(answer) == normalized(gold) for gold in right or [""]))
        f1.append(max(word_f1(answer, gold) for gold in right or [""]))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def prepare(splits: dict[str, Dataset], tokenizer: Any, arguments: AnswerArguments, seed: int) -> Task:
    """Make the task of the splits; of the one to score at the end also "rows", as they are, and their "windows".

    Raises:
        ValueError: if a row lacks a question, a context or answers.
    """
    splits.update({name: flat(rows) for name, rows in splits.items()})
    check_questions(splits["train"])
    test = choose_test_split(splits, "answers", seed)
    data = {}
    for name in used_splits(splits, test):
        check_questions(splits[name])
        data[name] = splits[name].map(
            partial(encode_train, tokenizer=tokenizer, arguments=arguments),
            batched=True,
            remove_columns=splits[name].column_names,
        )
    data["windows"] = splits[test].map(
        partial(encode_test, tokenizer=tokenizer, arguments=arguments),
        with_indices=True,
        batched=True,
        remove_columns=splits[test].column_names,
    )
    data["rows"] = splits[test]
    collator = DataCollatorWithPadding(tokenizer)
    return Task(AutoModelForQuestionAnswering, "QUESTION_ANS", data, test, collator, None, None, "question-answering")


def score(trainer: Trainer, task: Task, arguments: AnswerArguments) -> dict[str, float]:
    """Return SQuAD's figures of the split to score at the end."""
    encoded, rows = task.data["windows"], task.data["rows"]
    starts, ends = trainer.predict(encoded.remove_columns(["row", "context_tokens", "offset_mapping"])).predictions[:2]
    answers = answers_of(starts, ends, encoded, rows["context"], arguments)
    return squad_scores(answers, [found["text"] for found in rows["answers"]])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed."""
    return run(AnswerArguments, __doc__, prepare, argv, score)


if __name__ == "__main__":
    launched.run(main)
