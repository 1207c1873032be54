"""Which modules and parameters of a model a configuration names, and that nothing it says of them goes unheard."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_mask.model.heads import USUAL_HEADS
from peft_mask.model.names import plain_name
from peft_mask.settings.config import MaskConfig


def outermost_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of `model`, a tuner layer as one: not what it wraps."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        yield name, module


def matched_modules(model: nn.Module, config: MaskConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that `config` names to be masked, wrapped or not, with their names."""
    for name, module in outermost_modules(model):
        if name and check_target_module_exists(config, plain_name(name)):
            yield name, module


def matched_parameters(model: nn.Module, config: MaskConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield what `config.target_parameters` names: module name, module, and the parameter's own name."""
    for name, module, parameter in _own_parameters(model) if config.target_parameters else ():
        if any(f".{plain_name(name)}.{parameter}".endswith(f".{target}") for target in config.target_parameters or ()):
            yield name, module, parameter


def check_names(model: nn.Module, config: MaskConfig, found_here: bool = False) -> None:
    """Warn of what `config` names in vain; PEFT says nothing of it as long as one of the names is found.

    Args:
        model: the model.
        config: the configuration, as the user has written it.
        found_here: whether its `target_modules` are names that were found in the model, and not the user's.

    Raises:
        NoMatchingPeftModuleError: if nothing is called as `target_modules` and `target_parameters` say.
    """
    modules = [plain_name(name) for name, _ in outermost_modules(model)]
    parameters = [f"{plain_name(name)}.{parameter}" for name, _, parameter in _own_parameters(model)]
    parameters_called = _names(config.target_parameters)
    modules_called = [] if found_here else _names(config.target_modules)
    in_vain = {
        "target_modules": [one for one in modules_called if not _called(one, modules, config.target_modules)],
        "target_parameters": [one for one in parameters_called if not _called(one, parameters)],
        "exclude_modules": [
            one for one in _names(config.exclude_modules) if not _called(one, modules, config.exclude_modules)
        ],
        # PEFT looks at their ends alone, and adds the usual ones
        "modules_to_save": [
            one
            for one in _names(config.modules_to_save)
            if one not in USUAL_HEADS and not any(name.endswith(one) for name in modules)
        ],
    }
    asked = len(modules_called) + len(parameters_called)
    if asked and not found_here and asked == len(in_vain["target_modules"]) + len(in_vain["target_parameters"]):
        what = f"Target modules {set(modules_called)}" if modules_called else f"Parameters {parameters_called}"
        last = sorted({name.rpartition(".")[2] for name in (modules if modules_called else parameters) if name})
        raise NoMatchingPeftModuleError(
            f"{what} not found in the base model, a {type(model).__name__}. Names there end in {listed(last, 30)}."
        )
    saved = [
        one
        for one in modules_called
        if one not in in_vain["target_modules"] and not isinstance(config.target_modules, str)
        if all(_is_saved_whole(name, config) for name in _called(one, modules))
    ]
    said = [f"{field}={names}" for field, names in in_vain.items() if names]
    if said:
        warnings.warn(f"{type(model).__name__} has nothing called {' or '.join(said)}: check the names.", stacklevel=2)
    if saved and len(saved) < asked:
        warnings.warn(
            f"{saved} of target_modules are not masked, since modules_to_save trains them whole, as PEFT does with a "
            "task head. Name them in one of the two.",
            stacklevel=2,
        )


def check_found(model: nn.Module, config: MaskConfig) -> None:
    """Raise a `NoMatchingPeftModuleError` that says why, if there is nothing to mask."""
    if any(True for _ in matched_modules(model, config)) or any(True for _ in matched_parameters(model, config)):
        return
    bare = copy.copy(config)
    bare.exclude_modules = bare.modules_to_save = bare.layers_to_transform = None
    left = [name for name, _ in matched_modules(model, bare)]
    saved = [name for name in left if _is_saved_whole(name, config)]
    reasons = []
    if saved:
        reasons.append(f"modules_to_save={config.modules_to_save} trains {listed(saved)} whole")
    if others := [name for name in left if name not in saved]:
        reasons.append(f"exclude_modules={config.exclude_modules!r} leaves out {listed(others)}")
    raise NoMatchingPeftModuleError(
        f"nothing is left to mask in {type(model).__name__}: "
        + (" and ".join(reasons) or "no module or parameter is named by target_modules or target_parameters")
        + ". Name other target_modules, or leave less out."
    )


def apply_restrictions(model: nn.Module, config: MaskConfig) -> None:
    """Write out the targets of `config` by their full names where PEFT would not heed what restricts them.

    PEFT applies `layers_to_transform` to ends of names alone: not to a pattern, to `"all-linear"`, full names or
    parameters, and not to blocks at the top of a bare backbone; and `exclude_modules` not to parameters. Once written
    out, the targets are all there is to say, and `layers_to_transform` is None.

    Raises:
        ValueError: if `layers_to_transform` names a block that is not there, or blocks without anything to mask.
    """
    if config.layers_to_transform is None and not (config.target_parameters and config.exclude_modules):
        return
    anywhere = copy.copy(config)
    anywhere.layers_to_transform = None
    modules = [plain_name(name) for name, _ in matched_modules(model, anywhere)]
    parameters = [(plain_name(name), parameter) for name, _, parameter in matched_parameters(model, anywhere)]
    kept = {name for name, _ in parameters} - set(_excluded(model, config))
    if config.layers_to_transform is not None and (modules or kept):
        exact = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
        inside = _inside_blocks(model, config, [*modules, *kept])
        # a file names what it masks
        modules = [name for name in modules if name in inside or (config.is_saved and name in exact)]
        kept &= inside
        if not modules and not kept:
            raise NoMatchingPeftModuleError(
                f"none of the modules to mask stands in the blocks of layers_to_transform={config.layers_to_transform}."
            )
        config.layers_to_transform = config.layers_pattern = None
        if config.target_modules is not None:
            config.target_modules = set(modules)
    if kept != {name for name, _ in parameters}:
        config.target_parameters = sorted(f"{name}.{parameter}" for name, parameter in parameters if name in kept)
        if others := {plain_name(name) for name, _, _ in matched_parameters(model, config)} - kept:
            raise ValueError(
                f"the parameters of {sorted(others)} are to be left out, but end in the names of others, by which "
                "PEFT would find them, too: name what is to be masked in target_parameters."
            )


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in outermost_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for parameter, _ in base.named_parameters(recurse=False):
            yield name, module, parameter


def _names(names: Iterable[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or ())


def _called(name: str, names: Iterable[str], field: Iterable[str] | str | None = None) -> list[str]:
    """Return what is called `name`, or ends in it; or what it matches, where a field is a pattern."""
    if isinstance(field, str):
        return [one for one in names if re.fullmatch(name, one)]
    return [one for one in names if f".{one}".endswith(f".{name}")]


def _is_saved_whole(name: str, config: MaskConfig) -> bool:
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or [])


def listed(names: list[str], count: int = 5) -> str:
    """Return the first of some names, and how many more there are, for a message."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def _excluded(model: nn.Module, config: MaskConfig) -> Iterator[str]:
    alone = copy.copy(config)
    alone.target_modules, alone.exclude_modules, alone.modules_to_save = config.exclude_modules or set(), None, None
    alone.layers_to_transform = None
    return (plain_name(name) for name, _ in matched_modules(model, alone))


def _inside_blocks(model: nn.Module, config: MaskConfig, targets: list[str]) -> set[str]:
    """Return those of the targets that stand in the blocks that `config.layers_to_transform` says."""
    blocks = config.layers_to_transform
    wanted = {blocks} if isinstance(blocks, int) else set(blocks or ())
    of_targets = {name: _block_of(name, config.layers_pattern) for name in targets}
    lists = {block[0] for block in of_targets.values() if block}
    everywhere = (_block_of(name, config.layers_pattern) for name, _ in model.named_modules())
    there = {block[1] for block in everywhere if block and block[0] in lists}
    if (missing := wanted - there) and not config.is_saved:
        where = f"blocks {_ranges(there)} of {sorted(lists)}" if there else "no numbered blocks"
        pattern = "" if not config.layers_pattern else f" with layers_pattern={config.layers_pattern!r}"
        raise ValueError(
            f"layers_to_transform names {sorted(missing)}{pattern}, and the modules to mask stand in {where}: name "
            "blocks that are there, or leave layers_to_transform out."
        )
    return {name for name, block in of_targets.items() if block and block[1] in wanted}


def _block_of(name: str, patterns: list[str] | str | None) -> tuple[str, int] | None:
    """Return the list that the outermost block around a module is in, and the index of the block there."""
    for pattern in [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.\d][^.]*"]:
        if match := re.match(rf"((?:.*?\.)??{pattern})\.(\d+)(?:\.|$)", name):
            return match[1], int(match[2])
    return None


def _ranges(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} to {ordered[-1]}" if whole else ", ".join(map(str, ordered))
