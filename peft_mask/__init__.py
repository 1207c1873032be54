"""Masks as a PEFT method: learn which weights of a pretrained model to keep.

Importing the package registers the method with PEFT, as type `PEFT_MASK`; an adapter can be loaded only after it.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_mask.format.masks import Masks
from peft_mask.model.hotswap import hotswap_adapter
from peft_mask.model.mask_model import MaskModel
from peft_mask.model.state import keep_scores
from peft_mask.settings.card import update_model_card
from peft_mask.settings.config import MaskConfig, MaskType
from peft_mask.training.callback import MaskCallback
from peft_mask.training.control import DecayTowardKept, GradientDropout, HoldSparsity, SparsityPenalty
from peft_mask.training.memory import TrainingMemory, training_memory
from peft_mask.training.schedule import SparsitySchedule
from peft_mask.training.sign_adamw import SignAdamW
from peft_mask.training.training import (
    MaskStatistics,
    create_mask_optimizer,
    fill_budget,
    saliency_candidates,
    spend_budget,
)
from peft_mask.training.tuning import hold_zeros

__version__ = "0.1.0"

__all__ = [
    "DecayTowardKept",
    "GradientDropout",
    "HoldSparsity",
    "MaskCallback",
    "MaskConfig",
    "MaskModel",
    "MaskStatistics",
    "Masks",
    "SignAdamW",
    "SparsityPenalty",
    "SparsitySchedule",
    "TrainingMemory",
    "create_mask_optimizer",
    "fill_budget",
    "hold_zeros",
    "hotswap_adapter",
    "keep_scores",
    "saliency_candidates",
    "spend_budget",
    "training_memory",
    "update_model_card",
]

PEFT_TYPE_TO_CONFIG_MAPPING[MaskType.PEFT_MASK] = MaskConfig
PEFT_TYPE_TO_TUNER_MAPPING[MaskType.PEFT_MASK] = MaskModel
PEFT_TYPE_TO_MIXED_MODEL_MAPPING[MaskType.PEFT_MASK] = MaskModel
PEFT_TYPE_TO_PREFIX_MAPPING[MaskType.PEFT_MASK] = MaskModel.prefix
