"""`peft-mask verify`: whether an adapter and a base belong together."""

from __future__ import annotations

import argparse
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from peft_mask.cli.adapter import Adapter, read_adapter
from peft_mask.cli.answer import NO, OK, Answer, one_line, plain
from peft_mask.cli.base import NotForThisBaseError, add_base, load_base
from peft_mask.model.loading import checked_bits
from peft_mask.model.names import BITS, layers_of_adapter, module_name, named
from peft_mask.serving.source import TENSORS
from peft_mask.settings.config import MaskConfig

_ADAPTER = "default"
_SHOWN = 12  # names of masks that are wrong in the same way


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "verify",
        help="whether an adapter and a base belong together",
        description="Load a base, and hold every mask of an adapter against its weight: name, shape, checksum and\n"
        "fingerprint, 16 samples of the weight; then what was trained beside the masks. Nothing is\n"
        "written.",
        epilog="examples:\n  peft-mask verify runs/trec --base sentence-transformers/all-MiniLM-L6-v2\n"
        "  peft-mask verify runs/trec --base bert-base-uncased --json\n\n"
        "exit codes: 0 they belong together, 1 they do not, 2 one of them cannot be read",
    )
    one.add_argument("adapter", metavar="ADAPTER", help="a folder, or an id on the Hub")
    add_base(one, required=True)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Hold an adapter against a base."""
    adapter = read_adapter(options.adapter)
    config = _config(adapter)
    try:
        base, _ = load_base(options.base, adapter, options.dtype)
    except NotForThisBaseError as error:
        return _answer(options, adapter, {}, one_line(error))
    whole = None
    try:
        PeftModel.from_pretrained(base, str(adapter.folder), adapter_name=_ADAPTER, config=config)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        whole = one_line(error)
    return _answer(options, adapter, _wrong_masks(adapter, base, config), whole)


def _config(adapter: Adapter) -> MaskConfig:
    """The adapter's configuration; it does not get to say that nothing is to be checked."""
    config = MaskConfig.from_pretrained(str(adapter.folder))
    assert isinstance(config, MaskConfig)
    config.check_base, config.inference_mode = True, True
    return config


def _wrong_masks(adapter: Adapter, base: Any, config: MaskConfig) -> dict[str, str]:
    """What is wrong with each mask that is not for this base; one that could not be tried is not among them."""
    layers = {module_name(path): layer for path, layer in layers_of_adapter(base, _ADAPTER).items()}
    wrong = {}
    for name, record in named(load_file(adapter.folder / TENSORS), BITS).items():
        if not layers:
            break  # nothing was put into the base, and why is said by what refused it
        if name not in layers:
            wrong[name] = "the base has no such masked layer"
            continue
        try:
            checked_bits(name, layers[name], record, config)
        except ValueError as error:
            wrong[name] = one_line(str(error).removeprefix(f"cannot load the mask of '{name}': "))
    return wrong


def _answer(options: argparse.Namespace, adapter: Adapter, wrong: dict[str, str], whole: str | None) -> Answer:
    ok = whole is None and not wrong
    data = {
        "adapter": options.adapter,
        "base": options.base,
        "belong_together": ok,
        "masks": len(adapter.masks),
        "wrong_masks": wrong,
        "beside": len(adapter.beside),
        "refused_because": whole,
    }
    if ok:
        beside = f", and {len(adapter.beside)} tensors beside them" if adapter.beside else ""
        checked = "" if not adapter.beside or adapter.config.get("checksums") else " (of which no checksum is known)"
        count = len(adapter.masks)
        return Answer(
            data, f"They belong together, by samples of the weights: {count} masks of {count}{beside}{checked}."
        )
    lines = [f"They do not belong together: {len(wrong)} masks of {len(adapter.masks)} are wrong."]
    for reason in dict.fromkeys(wrong.values()):
        names = [plain(name) for name, own in wrong.items() if own == reason]
        lines += [f"{reason}", *(f"  {name}" for name in names[:_SHOWN])]
        if len(names) > _SHOWN:
            lines.append(f"  and {len(names) - _SHOWN} more (--json has all)")
    if whole is not None and not wrong:
        lines = ["They do not belong together.", f"  {whole}"]
    return Answer(data, "\n".join(lines), OK if ok else NO)
