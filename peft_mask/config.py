"""`MaskConfig`: what to mask, and where the scores start."""

from __future__ import annotations

import enum
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig

from peft_mask.atomic import replace_files
from peft_mask.card import is_card_due, update_model_card
from peft_mask.fields import check_choice, check_indices, check_names, check_number, check_switch, check_text


class MaskType(str, enum.Enum):
    """The PEFT type of this method; PEFT's own enum is closed to methods that live outside it."""

    PEFT_MASK = "PEFT_MASK"


Binarizer = Literal["topk", "threshold"]
CandidateRule = Literal["magnitude", "random"]
ScoresDtype = Literal["float32", "bfloat16"]
Structure = Literal["weight"]
InitWeights = Literal["uniform"]

DEFAULT_SPARSITY = 0.005


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
        binarizer: how scores become a mask. `"topk"`: of each matrix the `target_sparsity` with the lowest scores below
            the threshold are off, so that the size of the file is known beforehand and the learning rate of the scores
            does not matter. `"threshold"`: the paper's, a weight is kept where its score has reached the threshold.
        target_sparsity: fraction of the masked weights that `"topk"` switches off; by default 0.005, which costs about
            0.047 bit a masked weight.
        target_bytes: the size that `adapter_model.safetensors` is to have, without a task head; the sparsity is
            computed from it, and stands in `target_sparsity` once the model is wrapped. If that is given as well, it
            holds during training, and `target_bytes` from its end on.
        candidates: fraction of each matrix that has scores and may be switched off, or None: all of it. Scores, their
            gradient and optimizer state exist for candidates only.
        candidate_rule: which weights are candidates: `"magnitude"`, the largest, or `"random"`. Others, chosen by data
            or by a rule of one's own, are set with `MaskModel.set_candidates`.
        init_weights: starting scores. `True`: every weight kept; with `"threshold"`, large ones closer to it.
            `"uniform"`, for `"threshold"`: the paper's uniform distribution with a controlled fraction `init_sparsity`
            below the threshold. `False`: a random mask (for tests), which switches off the budget of `"topk"`, or with
            `"threshold"` `init_sparsity` (0.5 if not given).
        init_margin: distance above the threshold at which `"threshold"` with `init_weights=True` starts a weight whose
            magnitude is the root mean square of its matrix; others start in inverse proportion to their magnitude.
            Against learning rate times steps it decides how many weights can be switched off.
        init_sparsity: fraction of weights off at the start, for `"threshold"` with `init_weights` `"uniform"` (default
            0.05) and `False`.
        threshold: the paper's tau, which shifts the starting scores of `"uniform"`; scores are stored relative to it.
        scores_dtype: `"float32"`, or `"bfloat16"` for half the memory; in bfloat16 train with
            `create_mask_optimizer`, whose steps round stochastically, for small steps would be lost otherwise.
        structure: what one score governs. `"weight"`: a single weight.
        portable: whether the saved masks can be read by themselves and loaded onto the base model in any dtype. If not,
            their file is about a third smaller, and loads only onto the base model in float32 or bfloat16: where the
            zeros are is then told by counting the large weights of the base.
        target_parameters: names or suffixes of parameters to mask, such as the stacked weights of a mixture's experts
            (`"experts.gate_up_proj"`), which no module of their own holds. All adapters of a model name the same.
        trainable_token_indices: tokens whose embeddings are trained and saved whole beside the masks, as in LoRA.
        ensure_weight_tying: keep an embedding in `modules_to_save` and the output head tied to it one weight, as
            in LoRA. Masks of tied weights are refused either way.
        bias: accepted for symmetry with `LoraConfig`: only `"none"`, as the base model has to come back unchanged.
        seed: seed of everything random in the adapter; the same on every machine. By default the global torch
            generator, as in the rest of PEFT.
        check_base: refuse to load the adapter on another base model than it was trained on.
        record_bytes: not to be set: written on saving, the length of each record in `adapter_model.safetensors`, in the
            order of module names. transformers' `model.load_adapter` cannot load the masks without it.

    Raises:
        ValueError: if a field is out of range; the message names it.

    Example:
        >>> from peft_mask import MaskConfig
        >>> MaskConfig(task_type="SEQ_CLS", layers_to_transform=[2, 3, 4, 5]).target_sparsity
        0.005
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
    binarizer: Binarizer = field(default="topk", metadata={"help": "How scores become a mask."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights off, for topk."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the file, in place of a sparsity."})
    candidates: float | None = field(default=0.1, metadata={"help": "Fraction of weights with scores; None: all."})
    candidate_rule: CandidateRule = field(default="magnitude", metadata={"help": "Which weights have scores."})
    scores_dtype: ScoresDtype = field(default="float32", metadata={"help": "Dtype of the scores in training."})
    structure: Structure = field(default="weight", metadata={"help": "What one score governs."})
    portable: bool = field(default=True, metadata={"help": "Save masks that are read without the base weights."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to mask."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Tie saved modules that are tied in the base."})
    bias: Literal["none"] = field(default="none", metadata={"help": "Without effect; biases are not trained."})
    seed: int | None = field(default=None, metadata={"help": "Seed of everything random in the adapter."})
    check_base: bool = field(default=True, metadata={"help": "Refuse to load on another base model."})
    record_bytes: list[int] | None = field(default=None, metadata={"help": "Length of each record; set on saving."})

    def __post_init__(self) -> None:
        self._validate_types()
        super().__post_init__()
        self.peft_type = MaskType.PEFT_MASK
        self.modules_to_tie: set[str] | None = None  # where PEFT looks for what `ensure_weight_tying` found
        self._from_file = self.record_bytes is not None  # nobody else knows them when a configuration is made
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.binarizer == "topk" and self.target_sparsity is None and self.target_bytes is None:
            self.target_sparsity = DEFAULT_SPARSITY
        self._validate()

    @classmethod
    def paper(cls, **fields: Any) -> MaskConfig:
        """Return the paper's setting: a score for every weight, five per cent of them off at the start, no budget.

        Its choice of blocks (2 to 11 of BERT-base's 12, and the pooler) is `layers_to_transform`; its masked random
        head is not supported.

        Args:
            **fields: fields of `MaskConfig`, over those of the preset.

        Source: Zhao et al. 2020, section 4; official code, `parameters.py`.

        >>> MaskConfig.paper(task_type="SEQ_CLS").init_sparsity
        0.05
        """
        preset: dict[str, Any] = {
            "binarizer": "threshold",
            "candidates": None,
            "init_weights": "uniform",
            "init_sparsity": 0.05,
            "threshold": 0.01,
        }
        return cls(**(preset | fields))

    @property
    def records_to_come(self) -> list[int]:
        """`record_bytes` of a file that is about to be loaded; empty for a new adapter, or if they are unknown."""
        return self.record_bytes or [] if self._from_file or self.inference_mode else []

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, in the place of an old one in one step, and fill in the model card beside it."""
        with tempfile.TemporaryDirectory() as aside:  # PEFT would empty the old one before it writes the new
            super().save_pretrained(aside, **kwargs)
            written = {file.name: file.read_bytes() for file in Path(aside).iterdir()}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({folder / name: content for name, content in written.items()})
        # PEFT asks no method what to say in the model card. This is what it writes last, after card and adapter, and
        # the one method that is told the folder.
        if is_card_due(save_directory):
            try:
                update_model_card(save_directory)
            except (ValueError, OSError) as error:  # the adapter is saved, and a training is not lost for its card
                warnings.warn(f"the model card in '{save_directory}' is not filled in: {error}", stacklevel=2)

    def _validate_types(self) -> None:
        for name in ("fan_in_fan_out", "portable", "check_base", "inference_mode", "ensure_weight_tying"):
            check_switch(name, getattr(self, name))
        for name in ("base_model_name_or_path", "revision"):
            check_text(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name), single=True)
        for name in ("modules_to_save", "target_parameters"):
            check_names(name, getattr(self, name))
        if not isinstance(self.auto_mapping, (dict, type(None))):
            raise ValueError(f"auto_mapping must be a dictionary or None, got {self.auto_mapping!r}.")
        if (blocks := self.layers_to_transform) is not None:
            check_indices("layers_to_transform", [blocks] if type(blocks) is int else blocks)
        if (tokens := self.trainable_token_indices) is not None:
            if isinstance(tokens, (list, dict)) and not tokens:
                raise ValueError(f"trainable_token_indices names no token, got {tokens!r}: leave it out.")
            for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
                check_indices("trainable_token_indices", indices, least=0)
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 63):
            raise ValueError(f"seed must be a non-negative integer below 2^63 or None, got {self.seed!r}.")

    def _validate(self) -> None:
        check_choice("binarizer", self.binarizer, get_args(Binarizer))
        check_choice("candidate_rule", self.candidate_rule, get_args(CandidateRule))
        check_choice("scores_dtype", self.scores_dtype, get_args(ScoresDtype))
        self._validate_budget()
        if (sizes := self.record_bytes) is not None and not (
            isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
        ):
            raise ValueError(f"record_bytes must be a list of positive integers or None, got {sizes!r}.")
        check_choice("structure", self.structure, get_args(Structure))
        if not isinstance(self.init_weights, bool):
            check_choice("init_weights", self.init_weights, get_args(InitWeights), also="True or False")
        check_number("threshold", self.threshold)
        check_number("init_margin", self.init_margin, above=0.0)
        if self.binarizer == "topk" and (self.init_sparsity is not None or self.init_weights == "uniform"):
            field = "init_weights='uniform'" if self.init_sparsity is None else f"init_sparsity={self.init_sparsity}"
            raise ValueError(
                f'{field} has no meaning with binarizer="topk", which starts with every weight kept and switches off '
                'target_sparsity: use binarizer="threshold", or MaskConfig.paper() for the paper\'s setting.'
            )
        if self.init_sparsity is not None:
            check_number("init_sparsity", self.init_sparsity, above=0.0, below=1.0)
            if self.init_weights is True:
                raise ValueError(
                    f"init_sparsity={self.init_sparsity} has no meaning with init_weights=True, which starts with "
                    'every weight kept: use init_weights="uniform", or leave init_sparsity out.'
                )
        if self.bias != "none":
            raise ValueError(
                f'bias must be "none", got {self.bias!r}: a mask leaves the base model as it is, and biases are part '
                "of it. Modules to train whole are named in modules_to_save."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _validate_budget(self) -> None:
        if self.candidates is not None:
            check_number("candidates", self.candidates, above=0.0, most=1.0)
        given = [name for name in ("target_sparsity", "target_bytes") if getattr(self, name) is not None]
        if self.binarizer != "topk" and given:
            raise ValueError(
                f'{given[0]}={getattr(self, given[0])} needs binarizer="topk", which switches off as many weights as '
                f"it is told; with binarizer={self.binarizer!r} training decides how many. Leave one of them out."
            )
        if self.target_bytes is not None and (type(self.target_bytes) is not int or self.target_bytes <= 0):
            raise ValueError(f"target_bytes must be a positive integer, got {self.target_bytes!r}.")
        if self.target_sparsity is not None:
            check_number("target_sparsity", self.target_sparsity, above=0.0, below=1.0)
            if self.candidates is not None and self.target_sparsity > self.candidates:
                raise ValueError(
                    f"target_sparsity={self.target_sparsity} cannot be reached with candidates={self.candidates}, of "
                    "which all would be off: raise candidates, or set it to None."
                )
