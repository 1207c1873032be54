"""The choices that `MaskConfig` offers, and which of them go together."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from peft_mask.settings.fields import (
    check_checksums,
    check_choice,
    check_indices,
    check_names,
    check_number,
    check_switch,
    check_text,
)

Binarizer = Literal["topk", "threshold", "sign", "bernoulli", "n:m"]
CandidateRule = Literal["magnitude", "off-principal", "random"]
ScoresDtype = Literal["float32", "bfloat16"]
Structure = Literal["weight", "row", "column", "head", "matrix"]
Head = Literal["trained", "masked"]
InitWeights = Literal["uniform", "exact_uniform", "magnitude", "magnitude_and_uniform", "double_uniform"]

TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
LARGEST_GROUP = 32  # weights of an N:M group
GATES = "gate-projections"
WORDS = ("all-linear", GATES)  # in the place of names of modules
DEFAULT_SPARSITY = 0.005
GATES_SPARSITY = 0.002
DEFAULT_CANDIDATES = 0.1
DEFAULT_PATTERN = "2:4"
DEFAULT_TOKENS = 1.0
UNSET: Any = "auto"  # the default of a field that follows from the others where it is not given


def group_of(pattern: str) -> tuple[int, int]:
    """Return N and M of a pattern.

    Raises:
        ValueError: if it is none.

    >>> group_of("2:4")
    (2, 4)
    """
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", pattern) if isinstance(pattern, str) else None
    kept, size = (int(number) for number in match.groups()) if match else (0, 0)
    if not 0 < kept < size <= LARGEST_GROUP:
        raise ValueError(f'pattern must be "N:M" with 0 < N < M <= {LARGEST_GROUP}, got {pattern!r}.')
    return kept, size


def fill_in(config: Any) -> None:
    """Give the fields of a `MaskConfig` that were left open the values that go with those that were given."""
    if config.binarizer == UNSET:
        config.binarizer = _binarizer_for(config)
    if config.binarizer == "n:m" and config.pattern is None:
        config.pattern = DEFAULT_PATTERN
    if config.binarizer == "topk" and config.target_sparsity is None and config.target_bytes is None:
        config.target_sparsity = DEFAULT_SPARSITY
    if config.candidates == UNSET:
        sparsity = config.target_sparsity
        more = isinstance(sparsity, float) and sparsity > DEFAULT_CANDIDATES
        all_of_them = more or config.structure != "weight" or config.binarizer == "n:m"
        config.candidates = None if all_of_them else DEFAULT_CANDIDATES
    if config.gradient_tokens == UNSET:
        config.gradient_tokens = DEFAULT_TOKENS if config.binarizer == "topk" else 1.0


def _binarizer_for(config: Any) -> str:
    if config.pattern is not None:
        return "n:m"
    if isinstance(config.init_weights, str) or config.structure == "matrix":
        return "threshold"
    return "topk"


def check_types(config: Any) -> None:
    """Check that fields of a `MaskConfig` are of their types, before anything is made of them.

    Raises:
        ValueError: if one is not; the message names it.
    """
    for name in ("fan_in_fan_out", "portable", "check_base", "inference_mode", "ensure_weight_tying", "mask_biases"):
        check_switch(name, getattr(config, name))
    for name in ("base_model_name_or_path", "revision"):
        check_text(name, getattr(config, name))
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        check_names(name, getattr(config, name), single=True)
    for name in ("modules_to_save", "target_parameters"):
        check_names(name, getattr(config, name))
    if not isinstance(config.auto_mapping, (dict, type(None))):
        raise ValueError(f"auto_mapping must be a dictionary or None, got {config.auto_mapping!r}.")
    if (blocks := config.layers_to_transform) is not None:
        check_indices("layers_to_transform", [blocks] if type(blocks) is int else blocks, least=0)
        if type(blocks) is not int and not blocks:
            raise ValueError(f"layers_to_transform names no block, got {blocks!r}: leave it out for all of them.")
    if (tokens := config.trainable_token_indices) is not None:
        if isinstance(tokens, (list, dict)) and not tokens:
            raise ValueError(f"trainable_token_indices names no token, got {tokens!r}: leave it out.")
        for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
            check_indices("trainable_token_indices", indices, least=0)
    for name, none in (("seed", " or None"), ("head_seed", "")):
        seed = getattr(config, name)
        if not (seed is None and none) and (type(seed) is not int or not 0 <= seed < 1 << 63):
            raise ValueError(f"{name} must be a non-negative integer below 2^63{none}, got {seed!r}.")


def check_options(config: Any) -> None:
    """Check the fields of a `MaskConfig`, each for itself and together.

    Raises:
        ValueError: if a field is out of range, or has no meaning beside the others; the message names it.
    """
    check_choice("binarizer", config.binarizer, get_args(Binarizer))
    check_choice("candidate_rule", config.candidate_rule, get_args(CandidateRule))
    check_choice("scores_dtype", config.scores_dtype, get_args(ScoresDtype))
    check_choice("structure", config.structure, get_args(Structure))
    check_choice("head", config.head, get_args(Head))
    if config.head == "masked" and config.task_type not in ("SEQ_CLS", None):
        raise ValueError(
            f'head="masked" is for task_type="SEQ_CLS" or none, got {config.task_type!r}, with which PEFT would want '
            'to train the head after it was masked: leave task_type out, or set head="trained".'
        )
    _check_budget(config)
    _check_tokens(config)
    _check_pattern(config)
    _check_structure(config)
    _check_biases(config)
    _check_start(config)
    if (sizes := config.record_bytes) is not None and not (
        isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ValueError(f"record_bytes must be a list of positive integers or None, got {sizes!r}.")
    check_checksums("checksums", config.checksums)
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
    if config.target_modules is not None and not config.target_modules and not config.target_parameters:
        raise ValueError("target_modules names nothing to mask: leave it out for the default, or name modules.")


def _check_budget(config: Any) -> None:
    if config.candidates is not None:
        check_number("candidates", config.candidates, above=0.0, most=1.0)
    given = [name for name in ("target_sparsity", "target_bytes") if getattr(config, name) is not None]
    if config.binarizer != "topk" and given:
        raise ValueError(
            f'{given[0]}={getattr(config, given[0])} needs binarizer="topk", which switches off as many weights as '
            f"it is told; with binarizer={config.binarizer!r} "
            + ("the pattern says" if config.binarizer == "n:m" else "training decides")
            + " how many. Leave one of them out."
        )
    if config.target_bytes is not None and (type(config.target_bytes) is not int or config.target_bytes <= 0):
        raise ValueError(f"target_bytes must be a positive integer, got {config.target_bytes!r}.")
    if config.target_sparsity is not None:
        check_number("target_sparsity", config.target_sparsity, above=0.0, below=1.0)
        if config.candidates is not None and config.target_sparsity > config.candidates:
            raise ValueError(
                f"target_sparsity={config.target_sparsity} cannot be reached with candidates={config.candidates}, of "
                "which all would be off: raise candidates, or set it to None."
            )


def _check_tokens(config: Any) -> None:
    check_number("gradient_tokens", config.gradient_tokens, above=0.0, most=1.0)
    if config.gradient_tokens < 1 and config.binarizer != "topk":
        raise ValueError(
            f'gradient_tokens={config.gradient_tokens} needs binarizer="topk", which uses the signs of '
            f"gradients alone; with binarizer={config.binarizer!r} their size counts, too. Leave one of them out."
        )


def _check_pattern(config: Any) -> None:
    if config.pattern is None:
        return
    group_of(config.pattern)
    if config.binarizer != "n:m":
        raise ValueError(f'pattern={config.pattern!r} needs binarizer="n:m", got {config.binarizer!r}.')
    if config.candidates is not None:
        raise ValueError(
            f'candidates={config.candidates} has no meaning with binarizer="n:m", where every weight may go: set '
            "candidates=None."
        )


def _check_structure(config: Any) -> None:
    size, structure = config.head_size, config.structure
    if size is not None and (type(size) is not int or size <= 0):
        raise ValueError(f"head_size must be a positive integer or None, got {size!r}.")
    if structure == "weight":
        return
    if config.candidates is not None:
        raise ValueError(
            f"candidates={config.candidates} are single weights, which structure={structure!r} does not have: set "
            "candidates=None."
        )
    if config.binarizer == "n:m" or config.target_bytes is not None:
        field = 'binarizer="n:m"' if config.binarizer == "n:m" else f"target_bytes={config.target_bytes}"
        raise ValueError(f'{field} is for structure="weight", got {structure!r}.')
    if structure == "matrix" and config.binarizer == "topk":
        raise ValueError(
            'structure="matrix" has no meaning with binarizer="topk", which switches off some of each matrix: use '
            'binarizer="threshold".'
        )
    if structure == "head" and config.target_modules is None and config.target_parameters is None:
        raise ValueError(
            'structure="head" needs target_modules: name the query, key and value projections, whose rows are heads.'
        )


def _check_biases(config: Any) -> None:
    if config.mask_biases and (config.structure != "weight" or config.binarizer == "n:m"):
        field = 'binarizer="n:m"' if config.binarizer == "n:m" else f"structure={config.structure!r}"
        raise ValueError(
            f"mask_biases=True is for masks of single weights, a bias has none of the units of {field}: leave one of "
            "them out."
        )


def _check_start(config: Any) -> None:
    start = config.init_weights
    if not isinstance(start, bool):
        check_choice("init_weights", start, get_args(InitWeights), also="True or False")
    check_number("threshold", config.threshold)
    check_number("init_margin", config.init_margin, above=0.0)
    sparsity = config.init_sparsity
    compared = config.binarizer in ("threshold", "sign")
    if not compared and not isinstance(start, bool):
        given = f"init_weights={start!r}"
    elif config.binarizer in ("topk", "n:m") and sparsity is not None:
        given = f"init_sparsity={sparsity}"
    else:
        given = ""
    if given:
        how = {
            "topk": "starts with every weight kept and switches off target_sparsity",
            "n:m": "switches off what its pattern says, from the start on",
            "bernoulli": "starts with one probability for every weight, init_sparsity",
        }
        raise ValueError(
            f'{given} has no meaning with binarizer="{config.binarizer}", which {how[config.binarizer]}: use '
            'binarizer="threshold", or MaskConfig.paper() for the paper\'s setting.'
        )
    if sparsity is not None:
        check_number("init_sparsity", sparsity, above=0.0, below=1.0)
        if compared and start is True:
            raise ValueError(
                f"init_sparsity={sparsity} has no meaning with init_weights=True, which starts with "
                'every weight kept: use init_weights="uniform", or leave init_sparsity out.'
            )
        if config.binarizer == "bernoulli" and sparsity >= 0.5:
            raise ValueError(
                f'init_sparsity must be less than 0.5 with binarizer="bernoulli", got {sparsity}: in evaluation every '
                "weight would be off."
            )
    if config.binarizer == "sign" and config.init_margin > 1:
        raise ValueError(f'init_margin must be at most 1 with binarizer="sign", got {config.init_margin}.')
