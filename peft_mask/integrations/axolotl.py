"""A plugin for axolotl: `adapter: mask` in its YAML trains a mask in the place of LoRA.

    plugins: [peft_mask.integrations.axolotl.MaskPlugin]
    adapter: mask
    mask: {target_sparsity: 0.002}

axolotl's own modules are imported here, so this file is imported by axolotl alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field

from peft_mask.settings.config import MaskConfig
from peft_mask.training.callback import MaskCallback
from peft_mask.training.optimizer import create_mask_optimizer

ADAPTER = "mask"
LORA_KEYS = ("r", "alpha", "dropout", "target_modules", "target_linear", "modules_to_save")  # behind "lora_"


class MaskArgs(BaseModel):
    """What the plugin adds to axolotl's YAML.

    Attributes:
        mask: fields of `MaskConfig` by name; what is left out has its default.
    """

    mask: dict[str, Any] = Field(default_factory=dict)


class MaskPlugin(BasePlugin):
    """Brings masks to axolotl: the adapter, the optimizer of its scores, and `MaskCallback`.

    It does nothing unless the YAML says `adapter: mask`. Written for the plugin interface of axolotl 0.19.0
    (`axolotl/integrations/base.py`): there nobody calls a plugin's `create_optimizer`, so the optimizer comes by
    `post_trainer_create`.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{MaskArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Wrap a model with a new mask, or with the one in the folder that `lora_model_dir` names.

        Args:
            model: the base model.
            cfg: axolotl's configuration.
            inference: whether a loaded mask is only used.
            config_only: whether TRL is to wrap the model, as by DPO.

        Returns:
            The wrapped model, None if only the configuration is asked for, and the configuration; or None alone, if the
            YAML asks for another adapter.

        Raises:
            ValueError: if the YAML sets fields of LoRA, 4 or 8 bits, or fields that do not go together.
            TypeError: if `mask` has a field that `MaskConfig` has not.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = mask_config(cfg)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.peft_config["default"]
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [MaskCallback()] if cfg.adapter == ADAPTER else []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Let the trainer make the optimizer of masks; `learning_rate` and `weight_decay` are for what is no score."""
        if cfg.adapter != ADAPTER:
            return

        def create_optimizer(model: Any = None) -> torch.optim.Optimizer:
            if trainer.optimizer is None:
                settings = trainer.args
                trainer.optimizer = create_mask_optimizer(
                    trainer.model, lr=settings.learning_rate, weight_decay=settings.weight_decay
                )
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer


def mask_config(cfg: Mapping[str, Any]) -> MaskConfig:
    """Return the configuration of the mask that axolotl's YAML asks for.

    Raises:
        ValueError: if it sets fields of LoRA, which would be ignored, or 4 or 8 bits, which axolotl gives LoRA alone.
        TypeError: if `mask` has a field that `MaskConfig` has not.
    """
    if found := [f"lora_{key}" for key in LORA_KEYS if cfg.get(f"lora_{key}")]:
        raise ValueError(
            f"'{found[0]}' is LoRA's, and the YAML says 'adapter: {ADAPTER}': leave it out, and put what the mask is "
            "to have under 'mask', such as {target_sparsity: 0.002, target_modules: [q_proj]}."
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if cfg.get(key):
            raise ValueError(
                f"'{key}' is set, and axolotl quantizes a base for the adapters 'lora' and 'qlora' alone: leave it "
                "out. TRL trains masks over 4 bits (docs/four-bits.md)."
            )
    return MaskConfig(**{"task_type": "CAUSAL_LM", **(cfg.get("mask") or {})})
