"""Masks inside vLLM: switched in its weights between batches, or, as an experiment, mixed within one batch.

Nothing here needs vLLM to be imported. Its workers ask for their extension by name, before they load a model: that is
when what they compute with is prepared.
"""

from typing import TYPE_CHECKING

from peft_mask.vllm.switching import (
    SwitchFailedError,
    mask_in_force,
    mask_in_force_async,
    switch_mask,
    switch_mask_async,
)

if TYPE_CHECKING:
    from peft_mask.vllm.extension import MaskExtension
    from peft_mask.vllm.mixed import MixedMasks

__all__ = [
    "MaskExtension",
    "MixedMasks",
    "SwitchFailedError",
    "mask_in_force",
    "mask_in_force_async",
    "switch_mask",
    "switch_mask_async",
]


def __getattr__(name: str) -> object:
    if name == "MaskExtension":
        from peft_mask.vllm.cpu import keep_weights_in_place
        from peft_mask.vllm.extension import MaskExtension

        keep_weights_in_place()
        return MaskExtension
    if name == "MixedMasks":
        from peft_mask.vllm.cpu import keep_weights_in_place
        from peft_mask.vllm.mixed import MixedMasks, install

        keep_weights_in_place()
        install()
        return MixedMasks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
