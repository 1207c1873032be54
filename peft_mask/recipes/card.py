"""What the scripts add to the model card of an adapter: the command, the rows, the figures and the labels."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import TrainingArguments

from peft_mask.settings.card import update_model_card

_BEGIN, _END = "<!-- examples: how it was trained -->", "<!-- end of examples -->"


def command_of(kind: type, argv: Sequence[str] | None, arguments: TrainingArguments) -> str:
    """Return the command line as it was typed, without the token for the Hub.

    Args:
        kind: a class of the script.
        argv: the script's arguments, by default those of the process.
        arguments: what they say.
    """
    secrets = [
        getattr(arguments, name, None) for name in ("hub_token", "push_to_hub_token")
    ]  # the second: its old name
    script = Path(str(sys.modules[kind.__module__].__file__)).stem
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if word in filter(None, secrets):
            words.pop()  # the option before it, which may be shortened
        elif not any(word.endswith(f"={secret}") for secret in filter(None, secrets)):
            words.append(word)
    return shlex.join(["python", "-m", f"examples.{script}", *words])


def write_card(
    folder: Path,
    command: str,
    task: str,
    data: str,
    *,
    figures: Mapping[str, float],
    facts: Mapping[str, str],
    labels: Sequence[str] | None = None,
) -> None:
    """Write what is known of a training into the card of its adapter, in place of what an earlier training wrote.

    Args:
        folder: where the adapter is saved.
        command: what `command_of` returns.
        task: the Hub's name for it.
        data: what it is measured on: a data set of the Hub, or the name of a file.
        figures: what was measured, by name.
        facts: what else is known, such as the size of each split.
        labels: names of the classes in the order of the logits, if there are classes.
    """
    results = [
        EvalResult(task_type=task, dataset_type=data, dataset_name=data, metric_type=name, metric_value=value)
        for name, value in figures.items()
    ]
    try:
        update_model_card(folder, results)
        card = ModelCard.load(folder / "README.md")
    except (ValueError, OSError) as error:  # the adapter is saved, and a training is not lost for its card
        warnings.warn(f"the model card in '{folder}' does not say how it was trained: {error}", stacklevel=2)
        return
    card.text = re.sub(f"\n*{_BEGIN}.*?{_END}", "", card.text, flags=re.DOTALL).rstrip()
    card.text += f"\n\n{_section(command, task, figures, facts, labels)}\n"
    card.save(folder / "README.md")


def _section(
    command: str, task: str, figures: Mapping[str, float], facts: Mapping[str, str], labels: Sequence[str] | None
) -> str:
    lines = [f"| {name} | {_cell(text)} |" for name, text in facts.items()]
    lines += [f"| {name} | {value:.4f} |" for name, value in figures.items()]
    parts = [_BEGIN, "## How it was trained", f"```bash\n{command}\n```", "\n".join(["| | |", "|---|---|", *lines])]
    if labels is not None:
        named = ", ".join(f"`{label}`" for label in labels)
        parts.append(f"Its {len(labels)} labels, in the order of the logits: {named}. A loaded model has them.")
    return "\n\n".join([*parts, _END])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
