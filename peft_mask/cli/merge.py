"""`peft-mask merge`: base and adapter -> an ordinary checkpoint, for programs that know neither PEFT nor masks."""

from __future__ import annotations

import argparse
from inspect import signature
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from peft_mask.cli.adapter import Adapter, read_adapter
from peft_mask.cli.answer import Answer, plain, size
from peft_mask.cli.base import QUANTIZED, add_base, load_base
from peft_mask.cli.output import check_free, new_folder
from peft_mask.server.loading import quietly
from peft_mask.serving.labels import read_names

_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "merge",
        help="an ordinary checkpoint with the mask written into it",
        description="Write zeros where the mask is off, and save an ordinary checkpoint with its tokenizer. It needs\n"
        "neither PEFT nor this package. Into a quantized base the mask is written as codes: weights\n"
        "that are kept stay what they are.",
        epilog="examples:\n  peft-mask merge runs/trec --base bert-base-uncased --out merged\n"
        "  peft-mask merge runs/chat --base HuggingFaceTB/SmolLM2-135M --quantize nf4 --dequantize --out merged",
    )
    one.add_argument("adapter", metavar="ADAPTER", help="a folder, or an id on the Hub")
    add_base(one, required=True)
    one.add_argument("--quantize", choices=QUANTIZED, help="quantize the base first, as it was in training")
    one.add_argument("--dequantize", action="store_true", help="write floats, for programs without bitsandbytes")
    one.add_argument("--backbone", action="store_true", help="write the model without its head")
    one.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Merge an adapter."""
    check_free(options.out)
    adapter = read_adapter(options.adapter)
    base, missing = load_base(options.base, adapter, options.dtype, options.quantize)
    _check_head(options, adapter, missing)
    quantized = bool(getattr(base, "is_quantized", False))
    if options.dequantize and not quantized:
        raise ValueError("--dequantize is for a quantized base, and this one is not: leave it out.")
    merged = PeftModel.from_pretrained(base, str(adapter.folder)).merge_and_unload()
    _name_labels(merged, adapter)
    if options.backbone:
        merged = merged.base_model
    if options.dequantize:
        with quietly():
            merged = _in_floats(merged)
    with new_folder(options.out) as folder:
        _save(merged, folder)
        tokenizer = _save_tokenizer(options.base, adapter, folder)
    written = sum(file.stat().st_size for file in Path(options.out).iterdir())
    data = {
        "out": options.out,
        "class": type(merged).__name__,
        "dtype": str(merged.dtype).removeprefix("torch."),
        "quantized": quantized and not options.dequantize,
        "sparsity": adapter.zeros / max(adapter.weights, 1),
        "bytes": written,
        "tokenizer": tokenizer,
    }
    text = (
        f"{plain(options.out)}: an ordinary {data['class']} of {size(written)}"
        f"{', quantized' if data['quantized'] else ''}, {adapter.zeros:,} weights switched off\n"
        + ("with its tokenizer" if tokenizer else "without a tokenizer: neither base nor adapter has one")
    )
    return Answer(data, text)


def _check_head(options: argparse.Namespace, adapter: Adapter, missing: set[str]) -> None:
    """Refuse to write random weights: what the base lacks the adapter must bring, or draw from its own seed."""
    left = sorted(missing - adapter.beside.keys())
    if left and not options.backbone and adapter.config.get("head") != "masked":
        raise ValueError(
            f"'{left[0]}' is neither in the base nor in the adapter, and would be random: give --backbone for a model "
            "without head, or an adapter that has one."
        )


def _name_labels(model: Any, adapter: Adapter) -> None:
    """Give the labels their names, if they lie beside the adapter."""
    path = adapter.folder / "labels.json"
    if path.is_file():
        names = read_names(path, path.read_bytes())
        if len(names) != model.config.num_labels:
            raise ValueError(f"'{path}' names {len(names)} labels, the model has {model.config.num_labels}: mend it.")
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: place for place, name in enumerate(names)}


def _in_floats(model: Any) -> Any:
    """A model of floats with the values of a quantized one, which is used up."""
    model = model.dequantize()
    # transformers 5.23 does not save the model itself: it remembers how it was loaded, and cannot reverse that
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    plain_model = type(model)._from_config(config, dtype=model.dtype)
    plain_model.load_state_dict(model.state_dict())
    if getattr(model, "generation_config", None) is not None:
        plain_model.generation_config = model.generation_config
    return plain_model


def _save(model: Any, folder: Path) -> None:
    """Save a model, one in codes by the names that it has: transformers 5.23 cannot undo how it has loaded these."""
    quantized = getattr(model, "is_quantized", False)
    own_names = quantized and "save_original_format" in signature(model.save_pretrained).parameters
    with quietly():
        model.save_pretrained(folder, **({"save_original_format": False} if own_names else {}))


def _save_tokenizer(base: str, adapter: Adapter, folder: Path) -> bool:
    """Save the adapter's own tokenizer, which may have more tokens, or else the base's; whether there was one."""
    for place in (str(adapter.folder), base):
        if any(_has(place, name) for name in _TOKENIZERS):  # or transformers 5 makes one up, without any words
            AutoTokenizer.from_pretrained(place).save_pretrained(folder)
            return True
    return False


def _has(place: str, name: str) -> bool:
    if Path(place).is_dir():
        return (Path(place) / name).is_file()
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(place, name, **quiet) is not None
