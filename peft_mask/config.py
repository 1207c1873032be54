"""`MaskConfig`: what to mask, and where the scores start."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig


class MaskType(str, enum.Enum):
    """The PEFT type of this method; PEFT's own enum is closed to methods that live outside it."""

    PEFT_MASK = "PEFT_MASK"


Binarizer = Literal["threshold"]
Structure = Literal["weight"]
InitWeights = Literal["uniform"]


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of a mask: which weights are kept is learned, their values never change.

    Fields that mean the same as in `LoraConfig` have its names and defaults. `sparsity` is, here and everywhere, the
    fraction of weights that are switched off.

    Args:
        target_modules: names, suffixes or a regular expression of the modules to mask, or `"all-linear"`. By default
            every linear layer of the backbone; its embeddings, the output head and a task head are left out.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the blocks to mask; by default all.
        layers_pattern: name of the `ModuleList` that holds the blocks, if it is not found by itself.
        modules_to_save: modules trained and saved whole beside the masks. For sequence classification, token
            classification and question answering the whole task head is added: everything outside the backbone.
        fan_in_fan_out: accepted for symmetry with `LoraConfig` and without effect: a mask has the weight's own shape.
        init_weights: starting scores. `True`: every weight kept, large ones closer to the threshold. `"uniform"`: the
            paper's uniform distribution with a controlled fraction `init_sparsity` below the threshold. `False`: a
            random mask (for tests), with `init_sparsity` of the weights off (0.5 if not given).
        init_margin: distance above the threshold at which `init_weights=True` starts a weight whose magnitude is the
            root mean square of its matrix; others start in inverse proportion to their magnitude. Against learning
            rate times steps it decides how many weights can be switched off.
        init_sparsity: fraction of weights off at the start, for `init_weights` `"uniform"` (default 0.05) and `False`.
        threshold: the paper's tau, which shifts the starting scores of `"uniform"`; scores are stored relative to it.
        binarizer: how scores become a mask. `"threshold"`: kept where the score has reached the threshold.
        structure: what one score governs. `"weight"`: a single weight.
        target_parameters: not supported; named here because PEFT asks every configuration for it.
        seed: seed of everything random in the adapter; the same on every machine. By default the global torch
            generator, as in the rest of PEFT.
        check_base: refuse to load the adapter on another base model than it was trained on.

    Raises:
        ValueError: if a field is out of range; the message names it.

    Example:
        >>> from peft_mask import MaskConfig
        >>> MaskConfig(task_type="SEQ_CLS", layers_to_transform=[2, 3, 4, 5]).init_margin > 0
        True
    """

    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to mask."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to mask."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Without effect; a mask has its weight's shape."})
    init_weights: bool | InitWeights = field(default=True, metadata={"help": "Starting scores."})
    init_margin: float = field(default=0.016, metadata={"help": "Start of `init_weights=True` above the threshold."})
    init_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights off at the start."})
    threshold: float = field(default=0.0, metadata={"help": "The paper's threshold tau."})
    binarizer: Binarizer = field(default="threshold", metadata={"help": "How scores become a mask."})
    structure: Structure = field(default="weight", metadata={"help": "What one score governs."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})
    seed: int | None = field(default=None, metadata={"help": "Seed of everything random in the adapter."})
    check_base: bool = field(default=True, metadata={"help": "Refuse to load on another base model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MaskType.PEFT_MASK
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._validate()

    def _validate(self) -> None:
        _check_choice("binarizer", self.binarizer, get_args(Binarizer))
        _check_choice("structure", self.structure, get_args(Structure))
        if not isinstance(self.init_weights, bool):
            _check_choice("init_weights", self.init_weights, get_args(InitWeights), also="True or False")
        _check_number("threshold", self.threshold)
        _check_number("init_margin", self.init_margin, above=0.0)
        if self.init_sparsity is not None:
            _check_number("init_sparsity", self.init_sparsity, above=0.0, below=1.0)
            if self.init_weights is True:
                raise ValueError(
                    f"init_sparsity={self.init_sparsity} has no meaning with init_weights=True, which starts with "
                    'every weight kept: use init_weights="uniform", or leave init_sparsity out.'
                )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(f"seed must be a non-negative integer or None, got {self.seed!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters} is not supported: peft_mask masks whole modules. "
                "Name them in target_modules."
            )


def _check_choice(name: str, value: Any, choices: tuple[str, ...], also: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}{also and ', ' + also}, got {value!r}.")


def _check_number(name: str, value: Any, above: float = -math.inf, below: float = math.inf) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < below or not math.isfinite(value):
        bounds = f" greater than {above:g}" if above > -math.inf else ""
        bounds += f" and less than {below:g}" if below < math.inf else ""
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}.")
