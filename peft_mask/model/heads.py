"""Which modules of a model are its task head, or new: they are trained and saved, or it is said that they are not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_mask.settings.config import MaskConfig
from peft_mask.settings.options import TASKS_WITH_HEAD

# Classes of transformers whose head is of a task of the user's, and so not in the checkpoint of a pretrained backbone
_OF_A_TASK = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Segmentation|XVector|Regression)")
# ... and classes without a head, or whose parts outside the backbone were pretrained with it
_PRETRAINED = re.compile(
    r"(Model|Encoder|Decoder|Backbone)$|LM|Pre[Tt]raining|Projection|Generation|Prediction|Retrieval|Modeling|Matching"
)
USUAL_HEADS = ("classifier", "score", "qa_outputs")  # PEFT's names for heads
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which PEFT cannot train as one


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules with parameters that stand outside the backbone: the task head.

    They are newly initialized when a pretrained backbone is loaded, so they must be trained and saved: the classifier,
    and with it DeBERTa's pooler, DistilBERT's `pre_classifier`, ModernBERT's `head` and so on.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def new_modules(model: nn.Module) -> list[str] | None:
    """Return the names of the largest modules of which no parameter was in the model's checkpoint.

    transformers from 5.0 on marks each parameter that it reads. None where no parameter is marked: the model was made
    from a configuration, by an older release, or is a copy.

    Input and output embeddings of a language model are never among them: transformers exchanges them when a vocabulary
    is resized, and PEFT saves them then.
    """
    read = {parameter for parameter in model.parameters() if getattr(parameter, "_is_hf_initialized", False)}
    if not read or not isinstance(model, PreTrainedModel):
        return None
    for embeddings in (_embeddings(model, "get_input_embeddings"), output_embeddings(model)):
        read.update(() if embeddings is None else embeddings.parameters())
    return list(_largest_without(model, "", read))


def train_new_head(model: nn.Module, config: MaskConfig) -> None:
    """Write into `modules_to_save` of `config` what is new in `model`, where that is its task head; else warn of it.

    - With a `task_type` that has a head: all that stands outside the backbone, and what else is new.
    - Without a `task_type`: what is new in a model that has something outside its backbone, other than a language
      model. If that is not known, all outside the backbone of a class whose name says that it has the head of a task.
      A part whose every linear layer is named in `target_modules` is masked instead, unless it is known to be new: a
      mask of weights that nobody keeps could not be loaded.

    `modules_to_save=[]` says that nothing is to be trained and saved whole: nothing is added then, and nothing said.
    """
    with_task = config.task_type in TASKS_WITH_HEAD
    if config.is_saved or not isinstance(model, PreTrainedModel) or (config.modules_to_save == [] and not with_task):
        return
    outside, new = head_modules(model), new_modules(model)
    class_name, speaks = type(model).__name__, output_embeddings(model) is not None
    of_a_task = _OF_A_TASK.search(class_name) is not None
    if new is None and of_a_task and not outside:
        parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
        outside = [name for name in parts if name in (*USUAL_HEADS, "fc", "head")] or ["(the task head)"]
    head, masked = outside if new is None else new, list[str]()
    if with_task:
        wanted = [*outside, *(name for name in new or [] if not _within(name, outside))]
    elif config.task_type is None and not speaks and (of_a_task or (new is not None and outside)):
        masked = [name for name in head if new is None and _is_to_be_masked(model, name, config)]
        parts = list(_without_containers(model, (name for name in head if name not in masked)))
        wanted = [name for name in parts if _names_no_others(model, name, parts)]
    else:
        wanted = []
    saved = config.modules_to_save or []
    taken = [name for name, _ in model.named_modules() if name.endswith(tuple(saved))] if saved else []
    added = [name for name in wanted if name not in saved and (with_task or not _overlaps(name, taken))]
    config.modules_to_save = [*saved, *added] or config.modules_to_save
    cared_for = [*taken, *added, *masked]
    left = [name for name in head if not _within(name, cared_for) and not _all_below(model, name, cared_for)]
    if left and (new is not None or not (speaks or _PRETRAINED.search(class_name))):
        warnings.warn(
            f"{class_name} has modules that are neither trained nor saved, and as far as can be told were not in its "
            f"checkpoint: {', '.join(left[:5])}. A loaded adapter would meet other random ones. Name them in "
            "modules_to_save if they are used; modules_to_save=[] says that none is.",
            stacklevel=2,
        )


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{parent}.") for parent in parents)


def _overlaps(name: str, others: Iterable[str]) -> bool:
    return any(_within(name, [other]) or _within(other, [name]) for other in others)


def _all_below(model: nn.Module, name: str, added: list[str]) -> bool:
    parts = list(_without_containers(model, [name])) if added else []
    return bool(parts) and set(parts) <= set(added)


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer that makes tokens of a language model's states; None for other models."""
    return _embeddings(model, "get_output_embeddings")


def _embeddings(model: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        return cast("nn.Module | None", getattr(model, getter)())
    except (NotImplementedError, AttributeError):  # of a model that has none, or cannot say
        return None


def _largest_without(module: nn.Module, name: str, read: set[nn.Parameter]) -> Iterator[str]:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = cast(nn.Module, module.original_module)
    parameters = set(module.parameters())
    if not parameters or parameters <= read:
        return
    if name and parameters.isdisjoint(read):
        yield name
        return
    for below, child in module.named_children():
        yield from _largest_without(child, f"{name}.{below}" if name else below, read)


def _without_containers(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if isinstance(module, _CONTAINERS):
            yield from _without_containers(model, [f"{name}.{below}" for below, _ in module.named_children()])
        elif module is not None and any(True for _ in module.parameters()):
            yield name


def _is_to_be_masked(model: nn.Module, name: str, config: MaskConfig) -> bool:
    """Whether a user's `target_modules` name every linear layer of a part of the head, so that it is to be masked."""
    if config.target_modules is None or f"{config.target_modules}".lower() == "all-linear":
        return False
    linear = [
        below for below, module in model.named_modules() if _within(below, [name]) and isinstance(module, nn.Linear)
    ]
    return bool(linear) and all(check_target_module_exists(config, below) for below in linear)


def _names_no_others(model: nn.Module, name: str, parts: list[str]) -> bool:
    """Whether PEFT, which looks at ends of names, would train nothing by this name but parts of the head."""
    ends = [other for other, _ in model.named_modules(remove_duplicate=False) if other.endswith(name)]
    return name in ends and all(_within(other, parts) for other in ends)
