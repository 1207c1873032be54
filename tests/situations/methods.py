"""LoRA and masks behind the same few words, so that a situation is written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import TrainerCallback

from peft_mask import MaskCallback, MaskConfig, create_mask_optimizer


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        name: "lora" or "mask".
    """

    name: str

    def fresh(self, **fields: Any) -> PeftConfig:
        """As a user writes it: the adapter changes nothing yet."""
        if self.name == "lora":
            return LoraConfig(**{"r": 4, "target_modules": "all-linear"} | fields)
        return MaskConfig(**fields)

    def changed(self, seed: int = 0, **fields: Any) -> PeftConfig:
        """An adapter that changes what the model computes, without training."""
        torch.manual_seed(seed)
        if self.name == "lora":
            return self.fresh(init_lora_weights=False, **fields)
        return self.fresh(**{"init_weights": False, "target_sparsity": 0.05, "seed": seed} | fields)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.name == "lora":
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return create_mask_optimizer(model)

    def callbacks(self) -> list[TrainerCallback]:
        return [] if self.name == "lora" else [MaskCallback()]

    @property
    def tensor(self) -> str:
        """Part of the names of what its file holds."""
        return "lora_A" if self.name == "lora" else "peft_mask_bits"


METHODS = {name: Method(name) for name in ("lora", "mask")}
