"""Masks as a PEFT method: learn which weights of a pretrained model to keep.

Importing the package registers the method with PEFT, as type `PEFT_MASK`; an adapter can be loaded only after it.
Whatever users need is here, in `peft_mask.server`, `peft_mask.vllm` or `peft_mask.analysis`. `Masks` is here without
PEFT, too: a program that only reads and writes masks needs torch, numpy and safetensors.
"""

from typing import TYPE_CHECKING

from peft_mask.format.masks import Masks
from peft_mask.tensors.four_bits import kernels_unmentioned

__version__ = "0.1.0"

__all__ = [
    "HEAD_LR",
    "MASK_LR",
    "AdapterCache",
    "AdapterRefusedError",
    "DecayTowardKept",
    "GradientDropout",
    "HoldSparsity",
    "MaskCallback",
    "MaskConfig",
    "MaskLayer",
    "MaskModel",
    "MaskStatistics",
    "Masks",
    "NoRoomError",
    "SignAdamW",
    "SparsityPenalty",
    "SparsitySchedule",
    "TrainingMemory",
    "UnknownAdapterError",
    "create_mask_optimizer",
    "fill_budget",
    "hold_zeros",
    "hotswap_adapter",
    "keep_scores",
    "saliency_candidates",
    "spend_budget",
    "super_weights",
    "training_memory",
    "update_model_card",
    "use_triton",
]

try:
    with kernels_unmentioned():
        import peft
        import transformers  # noqa: F401
except ImportError as error:
    _reason = error  # `error` is gone after this block

    if not TYPE_CHECKING:  # or every name would be one of this module's

        def __getattr__(name: str) -> object:
            if name not in __all__:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            raise ImportError(
                f"peft_mask.{name} needs PEFT and transformers, and these cannot be imported here: {_reason}. "
                "Install them (pip install peft transformers); reading and writing masks with peft_mask.Masks works "
                "without."
            ) from _reason
else:
    from peft_mask.layers.correction import use_triton
    from peft_mask.layers.mask_layer import MaskLayer
    from peft_mask.model.hotswap import hotswap_adapter
    from peft_mask.model.mask_model import MaskModel
    from peft_mask.model.saving import keep_scores
    from peft_mask.serving.cache import AdapterCache
    from peft_mask.serving.errors import AdapterRefusedError, NoRoomError, UnknownAdapterError
    from peft_mask.settings.card import update_model_card
    from peft_mask.settings.config import MaskConfig, MaskType
    from peft_mask.training.callback import MaskCallback
    from peft_mask.training.control import DecayTowardKept, GradientDropout, HoldSparsity, SparsityPenalty
    from peft_mask.training.memory import TrainingMemory, training_memory
    from peft_mask.training.optimizer import HEAD_LR, MASK_LR, create_mask_optimizer
    from peft_mask.training.saliency import saliency_candidates
    from peft_mask.training.schedule import SparsitySchedule
    from peft_mask.training.sign_adamw import SignAdamW
    from peft_mask.training.spending import fill_budget, spend_budget
    from peft_mask.training.statistics import MaskStatistics
    from peft_mask.training.super_weights import super_weights
    from peft_mask.training.tuning import hold_zeros

    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MaskType.PEFT_MASK] = MaskConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[MaskType.PEFT_MASK] = MaskModel
    peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[MaskType.PEFT_MASK] = MaskModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MaskType.PEFT_MASK] = MaskModel.prefix
