"""On a CPU: keeps vLLM from packing weights into a form of the processor's own, which no patch could reach."""

from __future__ import annotations

import sys
from typing import Any

import torch


def keep_weights_in_place() -> None:
    """Let layers that are loaded from now on compute with their weights as they are; elsewhere than on a CPU they do.

    vLLM packs a layer's weight for oneDNN once it is loaded, and drops it. Where vLLM is not running nothing happens.
    """
    if "vllm" not in sys.modules:
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm.model_executor.layers.utils as utils

        utils.dispatch_cpu_unquantized_gemm = _computes_with_its_weight


def _computes_with_its_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
