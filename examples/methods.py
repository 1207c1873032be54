"""What the scripts share that train a chat model by rewards or preferences: a mask, LoRA or all weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoTokenizer

from peft_mask import MASK_LR, MaskConfig
from peft_mask.recipes.mask_arguments import targets_of
from peft_mask.recipes.models import pretrained

CANDIDATES = "off-principal"
DTYPES = {"mask": "bfloat16", "lora": "bfloat16", "full": "float32"}  # in bfloat16 steps are too small for a weight
LEARNING_RATES = {"mask": MASK_LR, "lora": 2e-4, "full": 1e-5}


@dataclass
class MethodArguments:
    """Which model is trained, and how; a script says by `SPARSITY` how large a mask is by default."""

    model_name_or_path: str = field(metadata={"help": "Chat model on the Hub, or a folder."})
    method: Literal["mask", "lora", "full"] = field(default="mask", metadata={"help": "What is trained."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Of the weights, by default bfloat16, or float32 if all of them are trained."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Which layers a mask or LoRA is for, or gate-projections; by default all linear ones."},
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of weights to switch off, by default 0.0001."}
    )
    target_bytes: int | None = field(default=None, metadata={"help": "Size of the mask's file, in its place."})
    schedule_end: float | None = field(
        default=None, metadata={"help": "Fraction of the steps in which the mask grows to that, by default 1.0."}
    )
    candidate_rule: Literal["magnitude", "random", "off-principal"] | None = field(
        default=None, metadata={"help": "Which weights of a mask have a score, by default off-principal."}
    )


def adapter_of(arguments: MethodArguments, default_sparsity: float) -> PeftConfig | None:
    """Return what TRL wraps the model with; None to train all of its weights.

    Raises:
        ValueError: if an argument is for another method, or out of range.
    """
    mask_only = ("target_sparsity", "target_bytes", "schedule_end", "candidate_rule")
    wrong = [name for name in mask_only if arguments.method != "mask" and getattr(arguments, name) is not None]
    if arguments.method == "full" and arguments.target_modules is not None:
        wrong.append("target_modules")
    if wrong:
        raise ValueError(f"--{wrong[0]} says nothing to --method {arguments.method}; leave it out.")
    targets = targets_of(arguments.target_modules)
    if arguments.method == "mask":
        sparsity = arguments.target_sparsity
        return MaskConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            target_sparsity=default_sparsity if sparsity is None and arguments.target_bytes is None else sparsity,
            target_bytes=arguments.target_bytes,
            candidate_rule=arguments.candidate_rule or CANDIDATES,
        )
    if arguments.method == "lora":
        if targets == "gate-projections":
            raise ValueError(
                f"--target_modules {targets} is known to masks alone; name the modules, such as gate_proj."
            )
        return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets or "all-linear")
    return None


def merge_to_generate(model: PeftModel) -> None:
    """Let a masked model merge its mask whenever it generates: every token then costs what it costs the base.

    What is generated is the same, to the bit, and so are the weights afterwards, however often.
    """
    generate = model.generate

    @wraps(generate)
    def merged(*args: Any, **settings: Any) -> Any:
        model.merge_adapter()
        try:
            return generate(*args, **settings)
        finally:
            model.unmerge_adapter()

    model.generate = merged


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer that can write a chat.

    Raises:
        ValueError: if there is none, or it has no chat template.
    """
    tokenizer = pretrained(AutoTokenizer, name, padding_side="left")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--model_name_or_path {name}: its tokenizer has no chat template, so no question can be asked; expected a "
            "chat model, such as one called -Instruct, or a chat_template.jinja beside the tokenizer."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def saved_bytes(folder: Path) -> int:
    """Return the size of all tensors that were saved in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
