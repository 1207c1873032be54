"""Learn a mask for tagging words, such as parts of speech or named entities, with any encoder.

    python -m examples.token_classification --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file examples/data/wnut17/train.conll --test_file examples/data/wnut17/test.conll --output_dir out

A file is in CoNLL columns (token first, tag last, a blank line between sentences; of CoNLL-U's ten columns the tag is
UPOS, and `--label_column xpos` takes another) or JSON or Parquet with a list of words and one of tags;
`--dataset_name` takes a data set of the Hub. The last piece of each word carries its tag, as in the
paper. Printed are the accuracy over words and, if tags are BIO, the F1 of spans, computed as seqeval does by default.
Every argument of `transformers.TrainingArguments` works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction

from peft_mask.recipes.files import FILE_TYPES
from peft_mask.recipes.rows import check_words, choose_column, label_names, label_numbers
from peft_mask.recipes.script import ScriptArguments, Task, choose_test_split, logits_of, run, used_splits
from peft_mask.recipes.tagging import IGNORED, label_last_pieces, span_f1, token_accuracy

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "pos_tags", "labels", "upos")


@dataclass
class TagArguments(ScriptArguments):
    """The arguments of this script."""

    # the endings under which columns are met; a cell of a table holds no list of words
    file_types: ClassVar[Mapping[str, str]] = FILE_TYPES | dict.fromkeys(
        (".tsv", ".txt", ".bio", ".iob", ".iob2"), "columns"
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the lists of words."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the lists of tags."})


def encode(
    split: Dataset, tokenizer: Any, word_column: str, tag_column: str, names: Sequence[str], max_length: int
) -> Dataset:
    """Turn words into pieces and tags into numbers, that of a word on its last piece.

    Raises:
        ValueError: if a row lacks words or tags, or a tag does not occur in the training data.
    """
    check_words(split, word_column, tag_column)
    tags = label_numbers(split, tag_column, names)

    def encode_batch(batch: Any, rows: list[int]) -> dict[str, list[Any]]:
        pieces = tokenizer(batch[word_column], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = [label_last_pieces(pieces.word_ids(place), tags[row]) for place, row in enumerate(rows)]
        return {**pieces, "labels": labels}

    return split.map(encode_batch, with_indices=True, batched=True, remove_columns=split.column_names)


def metrics_of(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that scores tags of these names: accuracy over words and, if they are BIO, F1 of spans."""
    is_bio = all(name == "O" or name[:2] in ("B-", "I-") for name in names)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        gold, predicted = [], []
        for labels, logits in zip(prediction.label_ids, logits_of(prediction), strict=True):
            kept = labels != IGNORED
            gold.append([names[number] for number in labels[kept]])
            predicted.append([names[number] for number in logits[kept].argmax(-1)])
        figures = {"accuracy": token_accuracy(gold, predicted)}
        return {**figures, "f1": span_f1(gold, predicted)} if is_bio else figures

    return metrics


def prepare(splits: dict[str, Dataset], tokenizer: Any, arguments: TagArguments, seed: int) -> Task:
    """Make the task of the splits.

    Raises:
        ValueError: if a column is missing, or a tag does not occur in the training data.
    """
    train = splits["train"]
    words = choose_column(train, arguments.text_column, WORD_COLUMNS, "text_column")
    tags = choose_column(train, arguments.label_column, TAG_COLUMNS, "label_column")
    check_words(train, words, tags)
    names = label_names(train, tags)
    test = choose_test_split(splits, tags, seed)
    data = {
        name: encode(splits[name], tokenizer, words, tags, names, arguments.max_seq_length)
        for name in used_splits(splits, test)
    }
    collator = DataCollatorForTokenClassification(tokenizer)
    return Task(
        AutoModelForTokenClassification,
        "TOKEN_CLS",
        data,
        test,
        collator,
        metrics_of(names),
        names,
        "token-classification",
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a mask as the arguments say, save it, and return the figures that are printed."""
    return run(TagArguments, __doc__, prepare, argv)
