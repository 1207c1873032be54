"""Analyses of masks: numbers in, tables out. Not loaded by `import peft_mask`; pictures are `peft_mask.analysis.plots`.

`python -m peft_mask.analysis` has those that need no data.
"""

from peft_mask.analysis.adapters import apply_masks, effective_weights, masks_of, write_weights
from peft_mask.analysis.connectivity import Curve, barrier, scan, train_curve
from peft_mask.analysis.controls import magnitude_masks, random_masks, reinitialize, shuffled
from peft_mask.analysis.ensembles import adapter_logits, ensemble, ensemble_table
from peft_mask.analysis.evaluation import accuracy, generalization, labels_of, logits_of
from peft_mask.analysis.representations import pooled_states, principal_components, separability, tsne
from peft_mask.analysis.similarity import block, dissimilarity, each, flip_ratio, iou, movement, whole
from peft_mask.analysis.storage import Storage, masked_shapes, paper_config, storage
from peft_mask.analysis.tables import markdown

__all__ = [
    "Curve",
    "Storage",
    "accuracy",
    "adapter_logits",
    "apply_masks",
    "barrier",
    "block",
    "dissimilarity",
    "each",
    "effective_weights",
    "ensemble",
    "ensemble_table",
    "flip_ratio",
    "generalization",
    "iou",
    "labels_of",
    "logits_of",
    "magnitude_masks",
    "markdown",
    "masked_shapes",
    "masks_of",
    "movement",
    "paper_config",
    "pooled_states",
    "principal_components",
    "random_masks",
    "reinitialize",
    "scan",
    "separability",
    "shuffled",
    "storage",
    "train_curve",
    "tsne",
    "whole",
    "write_weights",
]
