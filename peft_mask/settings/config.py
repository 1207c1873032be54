"""`MaskConfig`: what to mask, and where the scores start."""

from __future__ import annotations

import enum
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from peft_mask.format.atomic import replace_files
from peft_mask.settings.card import is_card_due, update_model_card
from peft_mask.settings.fields import names_given, places_of
from peft_mask.settings.foreign import explains_foreign_words
from peft_mask.settings.options import (
    GATES,
    GATES_SPARSITY,
    TASKS_WITH_HEAD,
    UNSET,
    WORDS,
    Binarizer,
    CandidateRule,
    Head,
    InitWeights,
    ScoresDtype,
    Structure,
    check_options,
    check_types,
    fill_in,
    group_of,
)


class MaskType(str, enum.Enum):
    """The PEFT type of this method; PEFT's own enum is closed to methods that live outside it."""

    PEFT_MASK = "PEFT_MASK"


@explains_foreign_words
@dataclass
class MaskConfig(PeftConfig):
    """Configuration of a mask: which weights are kept is learned, their values never change.

    Fields that mean the same as in `LoraConfig` have its names and defaults. `sparsity` is, here and everywhere, the
    fraction of weights that are switched off. `binarizer` and `candidates` follow from the other fields where they are
    not given (`"auto"`), and are what they came to once the configuration is made.

    Args:
        target_modules: names, suffixes or a regular expression of the modules to mask, `"all-linear"`, or
            `"gate-projections"`, the gates of gated feed-forward blocks (see `MaskConfig.gates`). By default every
            linear layer of the backbone; its embeddings, the output head and a task head are left out.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the blocks to mask; by default all. Once the model is wrapped,
            `target_modules` names what is in them, and this is None.
        layers_pattern: name of the `ModuleList` that holds the blocks, if it is not found by itself.
        modules_to_save: modules trained and saved whole beside the masks. A new task head is added, whatever the task:
            everything outside the backbone, and what else was not in the checkpoint. A head of which `target_modules`
            names every linear layer is masked instead; `[]` says that nothing is to be trained whole.
        head: `"trained"`, or the paper's `"masked"`: the whole task head, which the base model has no weights for, is
            overwritten with random ones (`random_weight`), frozen, and its linear layers are masked, whatever
            `target_modules` says, and so is a pooler before it, whatever `layers_to_transform` says. Nothing but masks
            is trained then, or saved. For `task_type="SEQ_CLS"`; for other heads leave `task_type` out.
        head_seed: the seed of these weights. Adapters of one model have the same head.
        fan_in_fan_out: accepted for symmetry with `LoraConfig` and without effect: a mask has the weight's own shape.
        binarizer: how scores become a mask; by default `"topk"`, or `"n:m"` where a `pattern` is given, or
            `"threshold"` where `init_weights` names a start or `structure` is `"matrix"`. `"topk"`: of each matrix the
            `target_sparsity` with the lowest scores below the threshold are off, so that the size of the file is known
            beforehand and the learning rate of the scores does not matter. `"threshold"`: the paper's, a weight is kept
            where its score has reached the threshold. `"sign"`: the same, and scores stay within [-1, 1].
            `"bernoulli"`: in training a weight is kept with the probability `sigmoid(score)`, drawn anew in every step;
            in evaluation, and when saved, it is kept where that is at least one half. `"n:m"`: of each M consecutive
            inputs of an output the N of highest score are kept.
        pattern: N and M of `"n:m"`, by default `"2:4"`. It divides the number of inputs.
        target_sparsity: fraction of the masked weights that `"topk"` switches off; by default 0.005, which costs about
            0.047 bit a masked weight.
        target_bytes: the size that `adapter_model.safetensors` is to have, without a task head; the sparsity is
            computed from it, and stands in `target_sparsity` once the model is wrapped. If that is given as well, it
            holds during training, and `target_bytes` from its end on.
        candidates: fraction of each matrix that has scores and may be switched off, or None: all of it. Scores, their
            gradient and optimizer state exist for candidates only. By default 0.1, and all where they must be: with
            another `structure` than `"weight"`, with `"n:m"`, and with a `target_sparsity` above 0.1.
        candidate_rule: which weights are candidates: `"magnitude"`, the largest; `"off-principal"`, the largest of
            those that are not among as many largest of the matrix's approximation of rank 32, for reinforcement
            learning (docs/grpo.md) and language models (docs/language-models.md); or `"random"`. Others, chosen by data
            or by a rule of one's own, are set with `MaskModel.set_candidates`.
        init_weights: starting scores. `True`: every weight kept; with `"threshold"` and `"sign"`, large ones closer to
            the threshold; with `"n:m"`, the largest of each group kept. `False`: a random mask (for tests), which
            switches off the budget of `"topk"`, the share of `"n:m"`, or `init_sparsity` (0.5 if not given). For
            `"threshold"` and `"sign"`, with `init_sparsity` off (0.05 if not given): `"uniform"`, the paper's uniform
            distribution; `"exact_uniform"`, so many at random, and `"magnitude"`, the smallest, both at `init_margin`
            from the threshold; `"magnitude_and_uniform"`, the latter in the backbone and the former in the head;
            `"double_uniform"`, so many at random, at a tenth to a half of `init_margin`. Others, computed or given, are
            set with `MaskModel.set_scores`.
        init_margin: distance from the threshold. With `init_weights=True`, that above it at which a weight starts whose
            magnitude is the root mean square of its matrix; others start in inverse proportion to their magnitude.
            Against learning rate times steps it decides how many weights can be switched off.
        init_sparsity: fraction of weights off at the start, see `init_weights`; for `"bernoulli"`, the probability of
            every weight to be off at the start (0.05 if not given).
        threshold: the paper's tau, which shifts the starting scores of `"uniform"`; scores are stored relative to it.
        scores_dtype: `"float32"`, or `"bfloat16"` for half the memory; in bfloat16 train with
            `create_mask_optimizer`, whose steps round stochastically, for small steps would be lost otherwise.
        gradient_tokens: fraction of the tokens of a batch from whose gradients the scores of linear layers learn. They
            are drawn in each layer, those with large gradients more often, so that the sum is right on average. By
            default 1, all of them. Of gradients `"topk"` uses the signs alone, which a part of the tokens tells; less
            has no meaning for others.
        structure: what one score governs. `"weight"`: a single weight; `"row"`: what makes one output, `"column"`: what
            reads one input; `"head"`: the rows of an attention head, of the query, key and value projections that
            `target_modules` names; `"matrix"`: a whole matrix. All but the first have no single weights as
            `candidates`, and count in `target_sparsity` and `init_sparsity`.
        mask_biases: mask the biases of masked linear layers and convolutions as well, each with scores, candidates and
            a budget of its own. For `structure="weight"`, and not for `"n:m"`.
        head_size: outputs of an attention head; by default as the model's configuration says.
        portable: whether the saved masks can be read by themselves and loaded onto the base model in any dtype. If not,
            their file is about a third smaller, and loads only onto the base model in float32 or bfloat16: where the
            zeros are is then told by counting the large weights of the base.
        target_parameters: names or suffixes of parameters to mask, such as the stacked weights of a mixture's experts
            (`"experts.gate_up_proj"`), which no module of their own holds. All adapters of a model name the same.
        trainable_token_indices: tokens whose embeddings are trained and saved whole beside the masks, as in LoRA.
        ensure_weight_tying: keep an embedding in `modules_to_save` and the output head tied to it one weight, as
            in LoRA. Masks of tied weights are refused either way.
        seed: seed of everything random in the adapter; the same on every machine. By default the global torch
            generator, as in the rest of PEFT.
        check_base: refuse to load the adapter on another base model than it was trained on.
        record_bytes: not to be set: written on saving, the length of each record in `adapter_model.safetensors`, in the
            order of module names. transformers' `model.load_adapter` cannot load the masks without it.
        checksums: not to be set: written on saving, the checksums of what stands beside the records, such as a task
            head. None, as in older files: they are not checked.
        id2label: not to be set: written on saving, the names of the labels by their places in the logits. A base model
            with a new head gets so many outputs, and these names, when the adapter is loaded onto it.

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
    init_margin: float = field(default=0.016, metadata={"help": "Distance of the starting scores from the threshold."})
    init_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights off at the start."})
    threshold: float = field(default=0.0, metadata={"help": "The paper's threshold tau."})
    binarizer: Binarizer = field(default=UNSET, metadata={"help": "How scores become a mask."})
    pattern: str | None = field(default=None, metadata={"help": "How many of how many are kept, for n:m."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Fraction of weights off, for topk."})
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the file, in place of a sparsity."})
    candidates: float | None = field(default=UNSET, metadata={"help": "Fraction of weights with scores; None: all."})
    candidate_rule: CandidateRule = field(default="magnitude", metadata={"help": "Which weights have scores."})
    scores_dtype: ScoresDtype = field(default="float32", metadata={"help": "Dtype of the scores in training."})
    gradient_tokens: float = field(default=UNSET, metadata={"help": "Fraction of tokens whose gradients are used."})
    mask_biases: bool = field(default=False, metadata={"help": "Mask the biases of masked layers, too."})
    structure: Structure = field(default="weight", metadata={"help": "What one score governs."})
    head_size: int | None = field(default=None, metadata={"help": "Outputs of an attention head."})
    portable: bool = field(default=True, metadata={"help": "Save masks that are read without the base weights."})
    head: Head = field(default="trained", metadata={"help": "Whether a task head is trained, or random and masked."})
    head_seed: int = field(default=0, metadata={"help": "Seed of the weights of a masked head."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to mask."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Tie saved modules that are tied in the base."})
    seed: int | None = field(default=None, metadata={"help": "Seed of everything random in the adapter."})
    check_base: bool = field(default=True, metadata={"help": "Refuse to load on another base model."})
    record_bytes: list[int] | None = field(default=None, metadata={"help": "Length of each record; set on saving."})
    checksums: dict[str, Any] | None = field(default=None, metadata={"help": "Of heads and such; set on saving."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of labels; set on saving."})

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        self.peft_type = MaskType.PEFT_MASK
        self.modules_to_tie: set[str] | None = None  # where PEFT looks for what `ensure_weight_tying` found
        self._from_file = self.record_bytes is not None  # nobody else knows them when a configuration is made
        self.head_names: tuple[str, ...] = ()  # of the model that it is for, once there is one
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                value = set(value)
            if isinstance(value, set) and len(value) == 1 and (word := next(iter(value))).lower() in WORDS:
                value = word  # a command line makes a list of it
            setattr(self, name, value)
        if isinstance(self.layers_to_transform, Collection):
            self.layers_to_transform = sorted(self.layers_to_transform)  # a range has no place in a file
        fill_in(self)
        check_options(self)
        self.id2label = places_of(self.id2label)

    @classmethod
    def paper(cls, **fields: Any) -> MaskConfig:
        """Return the paper's setting: a score for every weight, five per cent of them off at the start, no budget.

        With `task_type="SEQ_CLS"` the head is random and masked as well; for other heads leave `task_type` out and give
        `head="masked"`. The paper's choice of blocks, 2 to 11 of BERT-base's 12, is `layers_to_transform`.

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
            "init_margin": 0.01,
            "threshold": 0.01,
        }
        if fields.get("task_type") in TASKS_WITH_HEAD:
            preset["head"] = "masked"
        return cls(**(preset | fields))

    @classmethod
    def gates(cls, **fields: Any) -> MaskConfig:
        """Return the modules and the budget of Deletion Tuning: gate projections alone, 0.2 % of them off.

        For language models with gated feed-forward blocks (Llama, Qwen, Mistral, Gemma, T5 1.1, ...); a model without
        is refused. How the weights are found is ours: votes, no learning rate. docs/language-models.md compares.

        Args:
            **fields: fields of `MaskConfig`, over those of the preset.

        Source: Lu et al. 2026, arXiv 2611.10866.

        >>> MaskConfig.gates(task_type="CAUSAL_LM").target_sparsity
        0.002
        """
        has_own = {"target_bytes", "pattern"} & fields.keys() or fields.get("binarizer", "topk") != "topk"
        budget = {} if has_own else {"target_sparsity": GATES_SPARSITY}
        return cls(**({"target_modules": GATES} | budget | fields))

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of `pattern`; None without one."""
        return None if self.pattern is None else group_of(self.pattern)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of `id2label` in the order of the logits; None where nobody has named them."""
        return names_given(self.id2label or {})

    def is_in_head(self, name: str) -> bool:
        """Return whether the module of this name is part of the model's task head."""
        return any(f"{name}.".startswith(f"{head}.") for head in self.head_names)

    @property
    def is_saved(self) -> bool:
        """Whether it is that of a saved adapter, whose file says what is masked; else of a new one."""
        return self._from_file or self.inference_mode

    @property
    def records_to_come(self) -> list[int]:
        """`record_bytes` of a file that is about to be loaded; empty for a new adapter, or if they are unknown."""
        return self.record_bytes or [] if self.is_saved else []

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
