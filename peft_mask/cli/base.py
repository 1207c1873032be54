"""A base model, loaded as the class that an adapter was trained on."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from peft_mask.cli.adapter import Adapter
from peft_mask.format.mask_file import BIAS, read_config
from peft_mask.format.masks import Masks
from peft_mask.layers.drawn_head import draw_head
from peft_mask.model.targets import resolve_targets
from peft_mask.server.loading import quietly, widest_head
from peft_mask.serving.source import CONFIG, is_hub_id
from peft_mask.settings.config import MaskConfig

CLASSES: dict[str, Any] = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZED = ("nf4", "int8")


class NotForThisBaseError(ValueError):
    """The modules that an adapter masks are not in the base."""


def add_base(parser: Any, *, required: bool, why: str = "") -> None:
    """Add the options that name a base model."""
    parser.add_argument("--base", required=required, help=f"base model: a folder, or an id on the Hub{why}")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base; by default as it is stored")


def config_of(place: str) -> Any:
    """Return the configuration of a model, of transformers' kind.

    Raises:
        ValueError: there is none. The message names the place.
    """
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(_why_not(Path(place), place, error)) from error


def _why_not(path: Path, place: str, error: Exception) -> str:
    """Why there is no configuration of a model at a place, and what to do."""
    if (path / CONFIG).is_file():
        return f"'{place}' holds an adapter, not a base model: give the base that it was trained on{_base_of(path)}."
    reason = shorten(next(iter(str(error).splitlines()), ""), 300, placeholder=" ...")
    if path.exists():
        return f"there is no model of transformers at '{place}' that can be read: name another folder. ({reason})"
    if not is_hub_id(place) and not re.fullmatch(r"\w[\w.-]*", place):  # the oldest models have no user
        return f"there is no folder '{place}', and it is no id on the Hub like 'user/name': check the name."
    return (
        f"there is no folder '{place}', and it cannot be had from the Hub: check the name, the network and your login, "
        f"or give a folder. ({reason})"
    )


def _base_of(folder: Path) -> str:
    try:
        name = read_config(folder / CONFIG).get("base_model_name_or_path")
    except ValueError:
        return ""
    return f", '{name}' by its configuration" if isinstance(name, str) else ""


def class_for(adapter: Adapter, config: Any) -> Any:
    """Return transformers' class under which the masked modules have the names that the adapter's file has.

    Args:
        adapter: what is to be put on it.
        config: of the base model.

    Raises:
        NotForThisBaseError: there is none among those that come into question.
    """
    wanted = [mask.name.removesuffix(BIAS).replace(".base_layer", "") for mask in adapter.masks]
    missing = ""
    for each in _candidates(adapter, config):
        try:
            with torch.device("meta"):
                model = each.from_config(config) if hasattr(each, "from_config") else each(config)
        except ValueError:
            continue  # there is no such head for this kind of model
        names = {name for name, _ in model.named_modules()}
        absent = [name for name in wanted if name not in names]
        if not absent:
            return each
        missing = missing or f"a {type(model).__name__} has no module '{absent[0]}'"
    raise NotForThisBaseError(
        f"the base is none for the adapter '{adapter.name}': {missing or 'no class of transformers fits'}. Give the "
        f"base it was trained on{_named(adapter)}."
    )


def load_base(place: str, adapter: Adapter, dtype: str = "auto", quantized: str | None = None) -> tuple[Any, set[str]]:
    """Load a base model for an adapter: its class, as many labels, and rows for the tokens that the adapter brings.

    Args:
        place: a folder, or an id on the Hub.
        adapter: what is to be put on it.
        dtype: one of `DTYPES`.
        quantized: None, or one of `QUANTIZED`, for a base that is quantized by bitsandbytes while it is loaded.

    Returns:
        The model, in evaluation mode, and the names of its weights that `place` does not have.

    Raises:
        NotForThisBaseError: it is none for this adapter.
        OSError, ValueError: there is no such model.
    """
    config = config_of(place)
    kind = class_for(adapter, config)
    own: dict[str, Any] = {}
    if kind in (CLASSES["SEQ_CLS"], CLASSES["TOKEN_CLS"]):
        shapes = {name: shape for name, (_, shape, _) in adapter.beside.items()}
        shapes |= {f"{mask.name}.weight": mask.header.shape for mask in adapter.masks}  # a head may be masked
        if (labels := widest_head(kind, config, [shapes])) and labels != config.num_labels:
            own = {"num_labels": labels, "ignore_mismatched_sizes": True}
    if quantized is not None:
        own["quantization_config"] = _quantization(quantized)
    with quietly():
        model, report = kind.from_pretrained(place, dtype=dtype, output_loading_info=True, **own)
    _resize(model, adapter)
    _draw_head(model, adapter)
    return model.eval(), {str(name) for name in report["missing_keys"]} | {
        str(name[0] if isinstance(name, tuple) else name) for name in report["mismatched_keys"]
    }


def base_for_masks(options: argparse.Namespace, adapter: Adapter) -> Any:
    """Return the base that the command line names, or None if it names none."""
    return None if options.base is None else load_base(options.base, adapter, options.dtype)[0]


def masks_of(adapter: Adapter, base: Any) -> Masks:
    """Read an adapter's masks, with the base if there is one.

    Raises:
        ValueError: there is none, and the adapter needs it; or they do not belong together.
    """
    if base is None and not adapter.portable:
        raise ValueError(f"'{adapter.name}' is coded against its base: name it with --base, so that it can be read.")
    return Masks.load(adapter.folder, base)


def _candidates(adapter: Adapter, config: Any) -> Iterator[Any]:
    """Classes, the likeliest first. Of the adapter's words only names of transformers' own models count."""
    said = adapter.config.get("task_type")
    if isinstance(said, str) and said in CLASSES:
        yield CLASSES[said]
        return
    mapping = adapter.config.get("auto_mapping")
    names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    for name in [*names, *(config.architectures or [])]:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        of_a_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if of_a_model and isinstance(config, getattr(found, "config_class", None) or ()):
            yield found
    yield transformers.AutoModel
    yield from CLASSES.values()


def _resize(model: Any, adapter: Adapter) -> None:
    """Make room for the tokens of a tokenizer that lies beside the adapter, as PEFT's `AutoPeftModel` does."""
    if (adapter.folder / "tokenizer_config.json").is_file() and model.get_input_embeddings() is not None:
        tokens = len(AutoTokenizer.from_pretrained(adapter.folder))
        if tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokens)


def _draw_head(model: Any, adapter: Adapter) -> None:
    """Give the model the random head that the adapter masks, if it is one of those (`head="masked"`)."""
    if adapter.config.get("head") == "masked":
        config = MaskConfig.from_pretrained(str(adapter.folder))
        resolve_targets(model, config)
        draw_head(model, config.head_names, config.head_seed)


def _quantization(kind: str) -> Any:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _named(adapter: Adapter) -> str:
    name = adapter.config.get("base_model_name_or_path")
    return f", '{name}' by its configuration" if isinstance(name, str) else ""
