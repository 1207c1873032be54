"""The model card of an adapter: its figures, how to load it and how well it does, for people and for the Hub."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]  # huggingface_hub reads cards with it
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_mask.format.atomic import replace_files
from peft_mask.format.mask_file import read_config, read_headers
from peft_mask.format.payload import RANKS
from peft_mask.format.record import Header

_WEIGHTS_FILE, _CONFIG_FILE, _CARD_FILE = "adapter_model.safetensors", "adapter_config.json", "README.md"
_SENTENCE_TRANSFORMERS = "sentence-transformers"
_IMPORT = "import peft_mask  # without it, PEFT says KeyError: 'PEFT_MASK'"
_BEGIN, _END = "<!-- peft_mask: figures, filled in when the adapter is saved -->", "<!-- end of peft_mask -->"

# task type -> what PEFT calls the class that loads base model and adapter
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def update_model_card(folder: str | os.PathLike[str], results: Iterable[EvalResult] | None = None) -> None:
    """Fill in the model card, `README.md`, of a saved adapter; written anew if there is none.

    Saving an adapter calls this, so that it is only needed to add results. The metadata gets `library_name`,
    `base_model`, `tags` and, of the results, `model-index`; the text a section with sparsity, bits a weight, bytes and
    how to load the adapter. PEFT's card that nobody has filled in goes; all other text and metadata stay.

    sentence-transformers writes a card of its own, after the adapter, and asks nobody what to say in it: call this when
    the model is saved. The `library_name` stays its own then, and its examples begin with `import peft_mask`.

    Args:
        folder: where `save_pretrained` wrote the adapter.
        results: what was measured, as `huggingface_hub.EvalResult`; in place of results in the card for the same task,
            data set and metric. Those of others stay.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: the adapter is damaged, or the metadata of its card is not what the Hub takes.

    Example:
        >>> import torch
        >>> from huggingface_hub import EvalResult
        >>> from peft_mask import Masks, update_model_card
        >>> Masks({"layer": torch.tensor([[True, False], [True, True]])}).save("adapter")
        >>> accuracy = EvalResult(
        ...     task_type="text-classification",
        ...     dataset_type="banking77",
        ...     dataset_name="Banking77",
        ...     metric_type="accuracy",
        ...     metric_value=0.92,
        ... )
        >>> update_model_card("adapter", [accuracy])
    """
    folder = Path(folder)
    headers = [*read_headers(folder / _WEIGHTS_FILE).values()]
    config = read_config(folder / _CONFIG_FILE)
    card = _load(folder / _CARD_FILE)
    _fill_metadata(cast(ModelCardData, card.data), config, folder, list(results or []))
    section = _section(headers, config, (folder / _WEIGHTS_FILE).stat().st_size, _usage(config, folder, card))
    card.text = _with_section(_with_import(card.text), section)
    replace_files({folder / _CARD_FILE: str(card).encode()})


def is_card_due(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds an adapter and a model card."""
    return all((Path(folder) / name).is_file() for name in (_WEIGHTS_FILE, _CONFIG_FILE, _CARD_FILE))


def _load(file: Path) -> ModelCard:
    """The card, without the template that PEFT starts from, a page of "[More Information Needed]"."""
    if not file.is_file():
        return ModelCard("---\n{}\n---\n")
    try:
        card = ModelCard.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of '{file}' is not YAML: mend it, or delete the file ({error}).") from error
    card.text = card.text.removeprefix(_template())
    return card


@functools.cache  # to fill in a template takes as long as to save a small adapter
def _template() -> str:
    return ModelCard.from_template(ModelCardData()).text.rstrip()


def _fill_metadata(data: ModelCardData, config: dict[str, Any], folder: Path, results: list[EvalResult]) -> None:
    if data.library_name != _SENTENCE_TRANSFORMERS:
        data.library_name = "peft"
    tags = {*(data.tags or []), "peft-mask"} - {"base_model:adapter:"}  # PEFT's, of a base without a name
    if base := config.get("base_model_name_or_path"):
        data.base_model = data.base_model or base
        tags.add(f"base_model:adapter:{base}")
    data.tags = sorted(tags)
    if results:
        others = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(new) for new in results)]
        data.eval_results = others + results
        data.model_name = data.model_name or folder.resolve().name


def _with_section(text: str, section: str) -> str:
    """Put the section where it stood, or before the first heading below the title."""
    if old := re.search(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", text, flags=re.DOTALL):
        return text[: old.start()] + section + text[old.end() :]
    heading = re.search(r"^###? ", text, flags=re.MULTILINE)
    position = heading.start() if heading else len(text)
    parts = (text[:position].strip(), section, text[position:].strip())
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _with_import(text: str) -> str:
    """Let the examples of sentence-transformers' own card begin with our import."""
    block = r"^```python\n(?!import peft_mask)(?=(?:(?!```).*\n)*?from sentence_transformers import )"
    return re.sub(block, f"```python\n{_IMPORT}\n", text, flags=re.MULTILINE)


def _section(records: list[tuple[Header, int]], config: dict[str, Any], size: int, usage: str) -> str:
    base = config.get("base_model_name_or_path")
    weights = sum(math.prod(header.shape) for header, _ in records)
    sparsity = sum(header.zeros for header, _ in records) / max(weights, 1)
    coded = sum(length for _, length in records)
    return f"""{_BEGIN}
## A mask

It switches off {sparsity:.2%} of the weights it masks{f" in `{base}`" if base else ""}, and changes none.

| | |
|---|---|
| masked weights | {weights:,} in {len(records)} matrices |
| sparsity | {sparsity:.4%} |
| bits a masked weight | {8 * coded / max(weights, 1):.3f} |
| bytes of the masks | {coded:,} |
| bytes of `{_WEIGHTS_FILE}`, task head included | {size:,} |

{usage}{_needs_base(records)}
{_END}"""


def _needs_base(records: list[tuple[Header, int]]) -> str:
    if all(header.codec != RANKS for header, _ in records):
        return ""
    return "\n\nIt is coded against the weights of the base model: load that in float32 or bfloat16."


def _usage(config: dict[str, Any], folder: Path, card: ModelCard) -> str:
    name = _AUTO_CLASSES.get(config.get("task_type") or "")
    if cast(ModelCardData, card.data).library_name == _SENTENCE_TRANSFORMERS:
        own = folder / "config_sentence_transformers.json"
        name = (json.loads(own.read_text("utf-8")) if own.is_file() else {}).get("model_type", "SentenceTransformer")
        lines = [f"from sentence_transformers import {name}", "", f'model = {name}("this/repository")']
    elif name:
        lines = [
            f"from peft import {name}",
            "",
            f'model = {name}.from_pretrained("this/repository")',
        ]
    else:
        lines = ["from peft import PeftModel", "", 'model = PeftModel.from_pretrained(base_model, "this/repository")']
    return "\n".join(["```python", _IMPORT, *lines, "```"])
