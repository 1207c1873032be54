"""Embed texts so that those of one label lie together: sentence-transformers' own training, with one line changed.

    python -m examples.embeddings --train_file examples/data/banking77/train.csv \
        --test_file examples/data/banking77/test.csv --output_dir embedder

draws pairs of two texts of one label, each of a batch of another label, and trains by `MultipleNegativesRankingLoss`.
`--per_class 4` keeps four texts a label, for few examples in the way of SetFit: contrastive pairs first, then a
logistic regression on the embeddings. It prints how many held-out texts have a nearest neighbor of their label, and how
many that regression gets right, before and after; `embedder` is then loaded by `SentenceTransformer("embedder")`.
`--method lora` and `--method full` train the same steps by LoRA r=8 and of all weights, to compare.

The files are CSV, TSV, JSON, JSONL or Parquet with a column of texts and one of labels. Every argument of
`SentenceTransformerTrainingArguments` works; `--help` lists them. For a mask there is no learning rate to choose.
"""

from __future__ import annotations

import json
import random
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import SequentialSampler
from transformers import HfArgumentParser, set_seed

from examples.methods import saved_bytes
from examples.packaged import packaged_model
from peft_mask import MaskCallback, MaskConfig, create_mask_optimizer, update_model_card
from peft_mask.recipes.files import FILE_TYPES, load_file
from peft_mask.recipes.rows import check_texts, choose_column, label_texts, source_of
from peft_mask.recipes.script import LABEL_COLUMNS, set_device_defaults

LEARNING_RATES = {"mask": 2e-5, "lora": 5e-4, "full": 2e-5}  # of a mask: what else there is to train, mostly nothing


@dataclass
class ScriptArguments:
    """What `SentenceTransformerTrainingArguments` does not say."""

    train_file: str = field(metadata={"help": "CSV, TSV, JSON, JSONL or Parquet file of texts and labels."})
    test_file: str = field(metadata={"help": "File of held-out ones."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder on the Hub, or a folder; by default the packaged all-MiniLM-L6-v2."}
    )
    method: Literal["mask", "lora", "full"] = field(default="mask", metadata={"help": "What is trained."})
    text_column: str | None = field(default=None, metadata={"help": "Column of texts, by default text."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, by default label."})
    per_class: int | None = field(default=None, metadata={"help": "Texts of each label to keep, by default all."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights to switch off."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the mask's file, in its place."})


Labelled = dict[str, list[str]]  # texts by label


def load_texts(option: str, name: str, arguments: ScriptArguments) -> Labelled:
    """Load a file of texts and labels.

    Raises:
        ValueError: if it cannot be read, or has no such columns.
        FileNotFoundError: if it does not exist.
    """
    rows = load_file(option, name, FILE_TYPES)
    text = choose_column(rows, arguments.text_column, ("text", "sentence", "question"), "text_column")
    label = choose_column(rows, arguments.label_column, LABEL_COLUMNS, "label_column")
    check_texts(rows, [text])
    found: Labelled = defaultdict(list)
    for one, its_label in zip(rows[text][:], label_texts(rows, label), strict=True):
        found[its_label].append(one)
    if len(found) < 2:
        raise ValueError(f"{source_of(rows)}: all texts have one label; what is to lie apart needs two or more.")
    return found


def few(texts: Labelled, count: int | None, seed: int) -> Labelled:
    """Return some texts of each label, chosen by the seed, or all if no number is given.

    Raises:
        ValueError: if a pair needs more texts than that, or a label has fewer.
    """
    if count is None:
        count_of = {label: len(own) for label, own in texts.items()}
    elif count < 2:
        raise ValueError(f"--per_class {count}: a pair takes two texts of a label; give 2 or more.")
    else:
        count_of = dict.fromkeys(texts, count)
    draw = random.Random(seed)
    for label, own in texts.items():
        if len(own) < max(count_of[label], 2):
            wanted = "two for a pair" if count is None else f"--per_class {count}"
            raise ValueError(
                f"label {label!r} has {len(own)} texts, and {wanted} are needed; add some, or leave it out."
            )
    return {label: draw.sample(own, count_of[label]) for label, own in texts.items()}


def pairs(texts: Labelled, steps: int, batch: int, seed: int) -> Dataset:
    """Draw pairs of two texts of one label, in the order of the steps.

    The loss takes all other texts of a batch for negatives, so each of its pairs is of another label.

    Args:
        texts: two or more of each label.
        steps: number of batches.
        batch: pairs in each, no more than there are labels.
        seed: of what is drawn.

    Returns:
        Rows of an "anchor" and its "positive".
    """
    draw = random.Random(seed)
    labels = sorted(texts)
    drawn = [draw.sample(texts[label], 2) for _ in range(steps) for label in draw.sample(labels, batch)]
    return Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in drawn])


def in_order(rows: Dataset, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
    """Return batches of rows as they stand, where sentence-transformers would shuffle them."""
    return DefaultBatchSampler(SequentialSampler(rows), batch_size=batch_size, drop_last=drop_last)


def score(model: SentenceTransformer, train: Labelled, test: Labelled) -> dict[str, float]:
    """Return the share of held-out texts that are given their label by the embeddings of the texts to learn from.

    Returns:
        "nearest": by the text of largest cosine similarity; "logistic": by a logistic regression.
    """
    sides = []
    for texts in (train, test):
        sides.append(model.encode([text for own in texts.values() for text in own], normalize_embeddings=True))
        sides.append([label for label, own in texts.items() for _ in own])
    known, labels, asked, right = sides
    nearest = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(known, labels)
    logistic = LogisticRegression(C=10.0, max_iter=1000).fit(known, labels)
    return {"nearest": float(nearest.score(asked, right)), "logistic": float(logistic.score(asked, right))}


def adapter_of(arguments: ScriptArguments) -> PeftConfig | None:
    """Return what is added to the encoder; None to train all of its weights.

    Raises:
        ValueError: if a budget is given to another method, or is out of range.
    """
    budget = {"target_sparsity": arguments.target_sparsity, "target_bytes": arguments.target_bytes}
    if arguments.method == "mask":
        return MaskConfig(task_type="FEATURE_EXTRACTION", **budget)
    if given := [name for name, value in budget.items() if value is not None]:
        raise ValueError(f"--{given[0]} says nothing to --method {arguments.method}; leave it out.")
    if arguments.method == "lora":
        return LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules="all-linear")
    return None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say, save what was learned, and return the figures that are printed."""
    parser = HfArgumentParser(
        (ScriptArguments, SentenceTransformerTrainingArguments),
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(learning_rate=None, per_device_train_batch_size=32, max_steps=60)
    parser.set_defaults(save_strategy="no", report_to="none", logging_steps=10)
    set_device_defaults(parser)
    try:
        arguments, settings = parser.parse_args_into_dataclasses(args=argv)
        if settings.max_steps < 1:
            raise ValueError(f"--max_steps {settings.max_steps}: pairs are drawn for each step; give 1 or more.")
        settings.learning_rate = settings.learning_rate or LEARNING_RATES[arguments.method]
        set_seed(settings.seed)
        adapter = adapter_of(arguments)
        train = few(load_texts("train_file", arguments.train_file, arguments), arguments.per_class, settings.seed)
        test = load_texts("test_file", arguments.test_file, arguments)
        if unknown := sorted(test.keys() - train.keys()):
            raise ValueError(
                f"--test_file {arguments.test_file}: label {unknown[0]!r} is not among those to learn from."
            )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    model = SentenceTransformer(
        arguments.model_name_or_path or packaged_model(), device="cpu" if settings.use_cpu else None
    )
    before = score(model, train, test)
    if adapter is not None:
        model.add_adapter(adapter)  # the one line that is not in sentence-transformers' own scripts
    masks = arguments.method == "mask"
    settings.per_device_train_batch_size = min(settings.per_device_train_batch_size, len(train))
    settings.batch_sampler = in_order
    batch, steps = settings.per_device_train_batch_size, settings.max_steps * settings.gradient_accumulation_steps
    trainer = SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=pairs(train, steps, batch, settings.seed),
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(create_mask_optimizer(model) if masks else None, None),
        callbacks=[MaskCallback()] if masks else None,
    )
    trainer.train()
    output = Path(settings.output_dir)
    model.save_pretrained(str(output))
    if masks:
        update_model_card(output)  # sentence-transformers writes the card last
    results = {"method": arguments.method, "steps": trainer.state.global_step, "before": before}
    results |= {"after": score(model, train, test), "saved_bytes": saved_bytes(output)}
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    counts = [sum(map(len, texts.values())) for texts in (train, test)]
    print(f"\n{counts[0]} texts of {len(train)} labels to learn from, {counts[1]} held out:")
    words = {"nearest": "the nearest text has the label", "logistic": "a logistic regression is right"}
    for name, value in before.items():
        print(f"  {words[name]}: {value:.1%} before, {results['after'][name]:.1%} after")
    print(f"{output}: {results['saved_bytes']:,} bytes")
    return results


if __name__ == "__main__":
    main()
