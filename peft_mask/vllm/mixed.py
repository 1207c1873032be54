"""Masks, the base and LoRAs in one batch, on the routing that vLLM has for LoRA. An experiment, for one release of it.

A request names a mask's folder as it would a LoRA's. vLLM schedules it, keeps and evicts it, tells each layer the slot
of each token, and tells its prefix cache apart by name and folder. What is replaced in vLLM stands in `install`, and
`tests/vllm/test_contract.py` holds all of its names.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.cpu import add_an_empty_slot
from peft_mask.vllm.masked_lora import (
    check_engine,
    fill_slot,
    holds_masks,
    is_mask,
    masked_output,
    positions_by_layer,
    remember,
    tell,
)
from peft_mask.vllm.off import read_off
from peft_mask.vllm.release import check_release
from peft_mask.vllm.routing import Tokens

_CHECKPOINT = "_peft_mask_checkpoint"


class MixedMasks:
    """A worker extension that lets requests name masks as if they were LoRAs. An experiment.

    `vllm serve ... --worker-extension-cls peft_mask.vllm.MixedMasks --enable-lora --enforce-eager`. It brings no
    method: vLLM asks for it before it loads a model, and that is when its LoRA learns about masks.
    """


def install() -> None:
    """Let vLLM's LoRA take masks. Where they were let in before, nothing happens.

    Raises:
        ImportError: this vLLM is of another minor release; nothing of it has changed.
    """
    check_release()
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    for owner, name, replacement in (
        (LRUCacheWorkerLoRAManager, "create_lora_manager", _create_lora_manager),
        (WorkerLoRAManager, "_load_adapter", _load_adapter),
        (LoRAModelManager, "_create_merged_loras_inplace", _create_merged_loras_inplace),
        (LoRAModelManager, "activate_adapter", _activate_adapter),
        (LoRAModelManager, "_set_adapter_mapping", _set_adapter_mapping),
        (BaseLinearLayerWithLoRA, "_apply_sync", _apply_sync),
    ):
        original = getattr(owner, name)
        if not hasattr(original, "__wrapped__"):
            setattr(owner, name, _in_place_of(original, replacement))


def _in_place_of(original: Any, replacement: Any) -> Any:
    @wraps(original)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    return replaced


def _create_lora_manager(original: Any, self: Any, model: Any, vllm_config: Any) -> Any:
    check_engine(vllm_config)
    config = vllm_config.model_config
    setattr(self, _CHECKPOINT, Checkpoint.of(config.model, config.revision, vllm_config.load_config.download_dir))
    created = original(self, model, vllm_config)
    add_an_empty_slot(self._adapter_manager.modules.values())
    return created


def _load_adapter(original: Any, self: Any, lora_request: Any) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.utils import get_adapter_absolute_path

    folder = get_adapter_absolute_path(lora_request.lora_path)
    if not is_mask(folder):
        return original(self, lora_request)
    manager, checkpoint = self._adapter_manager, getattr(self, _CHECKPOINT)
    try:
        off = read_off(folder, checkpoint)
        positions = positions_by_layer(off, manager.modules, manager.packed_modules, checkpoint)
    except ValueError as error:
        raise ValueError(f"the adapter '{lora_request.lora_name}' in '{folder}' is refused: {error}") from error
    return remember(LoRAModel(lora_request.lora_int_id, 1, {}), positions)


def _create_merged_loras_inplace(original: Any, self: Any, lora_model: Any) -> None:
    if not holds_masks(lora_model):  # which has no matrices to put together
        original(self, lora_model)


def _activate_adapter(original: Any, self: Any, lora_id: int) -> bool:
    """Give an adapter a slot, as vLLM does; then its masks."""
    if not original(self, lora_id):
        return False
    try:
        fill_slot(self.modules, self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id])
    except BaseException:
        self.deactivate_adapter(lora_id)  # or it would answer as the base
        raise
    return True


def _set_adapter_mapping(original: Any, self: Any, mapping: Any) -> None:
    original(self, mapping)
    tell([*self.punica_wrapper_mapping.values()], Tokens(mapping.index_mapping, self.lora_index_to_id))


def _apply_sync(original: Any, self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    output = masked_output(self, x, bias)
    if output is None:
        return original(self, x, bias)
    return self._apply_lora_to_output(x, output)
