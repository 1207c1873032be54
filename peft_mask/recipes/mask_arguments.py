"""`MaskConfig` on a command line: its fields by their names, each of a type that can be typed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import Binarizer, CandidateRule, Head, ScoresDtype, Structure

SHORTHANDS = ("all-linear", "gate-projections")  # of `target_modules`, where a text is else a pattern
# of PEFT, of a saved adapter, or `seed`, which is that of the whole training
NOT_TYPED = {"fan_in_fan_out", "id2label", "trainable_token_indices", "seed", "record_bytes", "checksums"}


_SAID = {each.name: {"help": f"MaskConfig: {each.metadata.get('help')}"} for each in fields(MaskConfig)}


@dataclass(kw_only=True)
class MaskArguments:
    """Fields of `MaskConfig`; None is its own default."""

    target_sparsity: float | None = field(default=None, metadata=_SAID["target_sparsity"])
    target_bytes: int | None = field(default=None, metadata=_SAID["target_bytes"])
    target_modules: list[str] | None = field(default=None, metadata=_SAID["target_modules"])
    exclude_modules: list[str] | None = field(default=None, metadata=_SAID["exclude_modules"])
    layers_to_transform: list[int] | None = field(default=None, metadata=_SAID["layers_to_transform"])
    layers_pattern: str | None = field(default=None, metadata=_SAID["layers_pattern"])
    modules_to_save: list[str] | None = field(default=None, metadata=_SAID["modules_to_save"])
    target_parameters: list[str] | None = field(default=None, metadata=_SAID["target_parameters"])
    candidates: str | None = field(default=None, metadata={"help": "MaskConfig: fraction with scores, or `all`."})
    candidate_rule: CandidateRule | None = field(default=None, metadata=_SAID["candidate_rule"])
    binarizer: Binarizer | None = field(default=None, metadata=_SAID["binarizer"])
    pattern: str | None = field(default=None, metadata=_SAID["pattern"])
    structure: Structure | None = field(default=None, metadata=_SAID["structure"])
    head: Head | None = field(default=None, metadata=_SAID["head"])
    head_seed: int | None = field(default=None, metadata=_SAID["head_seed"])
    head_size: int | None = field(default=None, metadata=_SAID["head_size"])
    init_weights: str | None = field(default=None, metadata=_SAID["init_weights"])
    init_margin: float | None = field(default=None, metadata=_SAID["init_margin"])
    init_sparsity: float | None = field(default=None, metadata=_SAID["init_sparsity"])
    threshold: float | None = field(default=None, metadata=_SAID["threshold"])
    scores_dtype: ScoresDtype | None = field(default=None, metadata=_SAID["scores_dtype"])
    gradient_tokens: float | None = field(default=None, metadata=_SAID["gradient_tokens"])
    mask_biases: bool | None = field(default=None, metadata=_SAID["mask_biases"])
    portable: bool | None = field(default=None, metadata=_SAID["portable"])
    check_base: bool | None = field(default=None, metadata=_SAID["check_base"])
    ensure_weight_tying: bool | None = field(default=None, metadata=_SAID["ensure_weight_tying"])


def mask_config(arguments: MaskArguments, task_type: str | None, **own: Any) -> MaskConfig:
    """Return the configuration of a mask that the arguments ask for.

    Args:
        arguments: what was said.
        task_type: PEFT's name for the task.
        **own: fields that follow from the task, in place of the defaults of `MaskConfig`.

    Raises:
        ValueError: if a field is out of range, or some do not go together.
    """
    given = {each.name: getattr(arguments, each.name) for each in fields(MaskArguments)}
    given = {name: value for name, value in given.items() if value is not None}
    if (names := given.get("target_modules")) is not None:
        given["target_modules"] = targets_of(names)
    if (share := given.get("candidates")) is not None:
        given["candidates"] = None if share == "all" else _number("candidates", share)
    if given.get("init_weights") in ("true", "false", "True", "False"):
        given["init_weights"] = given["init_weights"].lower() == "true"
    return MaskConfig(**({"task_type": task_type} | own | given))


def targets_of(names: list[str] | None) -> list[str] | str | None:
    """Return what `--target_modules` means to PEFT: names of modules, or a shorthand, which stands alone.

    Raises:
        ValueError: if there is more beside it.
    """
    if found := [name for name in names or [] if name.lower() in SHORTHANDS]:
        if len(names or []) > 1:
            raise ValueError(f"--target_modules {found[0]} stands for modules itself; leave the other names out.")
        return found[0].lower()
    return names


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{name} {text}: expected a fraction such as 0.1, or 'all'.") from None
