"""Words of other methods that `MaskConfig` does not have, and what to say in their place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from peft import LoraConfig

_SIZE = "target_sparsity, the fraction of weights that are switched off, or target_bytes, the size of the file, sets"
_FRACTION = "sparsity is the fraction of weights that are switched off, everywhere: give it as target_sparsity"
_EVERYWHERE = "every matrix has the same budget: target_modules, exclude_modules and layers_to_transform say where"
_HELP = {
    **dict.fromkeys(("r", "rank", "lora_r"), f"a mask has no rank: {_SIZE} how large it is"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _EVERYWHERE),
    **dict.fromkeys(("lora_alpha", "alpha", "scaling", "use_rslora"), "a mask is not scaled: leave it out"),
    **dict.fromkeys(
        ("lora_dropout", "dropout"),
        "a mask has no dropout of its own: leave it out, or see GradientDropout, which drops gradients of scores",
    ),
    **dict.fromkeys(
        ("bias", "lora_bias"), "biases stay what they are: leave it out, or mask them with mask_biases=True"
    ),
    **dict.fromkeys(("init_lora_weights", "init"), "where scores start is init_weights"),
    **dict.fromkeys(("density", "keep_ratio", "keep"), f"{_FRACTION}, which is 1 minus the fraction that is kept"),
    **dict.fromkeys(("sparsity", "prune_rate", "pruning_ratio"), _FRACTION),
    **dict.fromkeys(("lr", "learning_rate"), "learning rates are arguments of create_mask_optimizer"),
}
_OF_LORA = {field.name for field in dataclasses.fields(LoraConfig)}

Config = TypeVar("Config")


def explains_foreign_words(config_type: type[Config]) -> type[Config]:
    """Let a configuration say of an argument that it does not have what takes its place: a decorator.

    The `TypeError` begins as Python's own, by which PEFT knows a file of a later version.
    """
    init = cast(Callable[..., None], config_type.__init__)
    known = [field.name for field in dataclasses.fields(cast(Any, config_type)) if field.init]

    @wraps(init)
    def explained(self: Config, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in known:
                raise TypeError(
                    f"{config_type.__name__}.__init__() got an unexpected keyword argument '{name}': "
                    + _help(name, known)
                )
        init(self, *args, **fields)

    config_type.__init__ = explained  # type: ignore[method-assign,assignment]
    return config_type


def _help(name: str, known: list[str]) -> str:
    if name in _HELP:
        return _HELP[name] + "."
    if name in _OF_LORA:
        return "it belongs to LoraConfig, and a mask has nothing like it: leave it out."
    similar = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {similar[0]}?" if similar else "help(MaskConfig) lists all fields."
