"""AdamW for all methods.

The head is new in every method, so it learns at one rate of its own, `HEAD_LR`, the same for all; the rate that dev
chooses is that of the pretrained weights, of LoRA's matrices, or of the mask's scores. With one rate for everything, as
is the habit, full fine-tuning at the small rates it likes leaves the head untrained in budgets as short as these.
"""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.accuracy.sizes import in_head

HEAD_LR = 5e-3
HEAD_NOTE = f"the head learns at {HEAD_LR:g}"


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """AdamW with the head at `HEAD_LR` and everything else that is trained at `lr`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not in_head(name)], "lr": lr},
        {"params": [p for name, p in trained if in_head(name)], "lr": HEAD_LR},
    ]
    return AdamW(groups, weight_decay=0.0, fused=True)
