"""`Trainer` as the recipes use it: it makes its optimizer itself, and the card says how the adapter was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer


class OptimizerTrainer(Trainer):
    """A trainer that is told how to make its optimizer, as FSDP and DeepSpeed let it have none from outside.

    Args:
        make_optimizer: makes it of the model.
        settings: those of `Trainer`.
    """

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.make_optimizer = make_optimizer
        self.optimizer: torch.optim.Optimizer | None
        self.finish_card: Callable[[], None] | None = None  # what the card says of the training; pushing writes it anew

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(self.model)
        return self.optimizer

    def create_model_card(self, *arguments: Any, **settings: Any) -> None:
        super().create_model_card(*arguments, **settings)
        if self.finish_card is not None and self.is_world_process_zero():
            self.finish_card()
