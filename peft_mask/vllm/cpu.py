"""What is different in vLLM's build for CPUs: weights are packed away, and the base falls into a LoRA's slot."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_mask.vllm.release import check_release


def _on_a_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def keep_weights_in_place() -> None:
    """Let layers that are loaded from now on compute with their weights as they are; elsewhere than on a CPU they do.

    vLLM packs a layer's weight for oneDNN once it is loaded, and drops it: no patch would reach it. Where vLLM is not
    running nothing happens.

    Raises:
        ImportError: this vLLM is of another minor release; nothing of it has changed.
    """
    if "vllm" not in sys.modules:
        return
    check_release()
    if _on_a_cpu():
        import vllm.model_executor.layers.utils as utils

        utils.dispatch_cpu_unquantized_gemm = _computes_with_its_weight


def _computes_with_its_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def add_an_empty_slot(layers: Iterable[Any]) -> None:
    """Put an empty slot behind those that LoRAs are put into; elsewhere than on a CPU nothing is amiss.

    Tokens of no LoRA have the slot -1. The operators for a CPU take that for the last one, so that in a batch with a
    LoRA the base would answer with whatever LoRA is there.

    Args:
        layers: those that vLLM would give a LoRA.
    """
    if not _on_a_cpu():
        return
    for layer in layers:
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = layer.__dict__.get(name)
            if isinstance(stacked, Tensor):
                setattr(layer, name, _with_one_more(stacked))
            elif stacked is not None:
                setattr(layer, name, tuple(map(_with_one_more, stacked)))


def _with_one_more(slots: Tensor) -> Tensor:
    return torch.cat([slots, torch.zeros_like(slots[:1])])
