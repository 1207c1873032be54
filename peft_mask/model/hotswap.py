"""Another adapter's masks in the tensors of one that is loaded: nothing is recompiled, no address changes."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel, set_peft_model_state_dict
from peft.utils import infer_device, load_peft_weights

from peft_mask.format.checksums import check
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.model.beside import check_own_shapes
from peft_mask.model.names import BITS, named
from peft_mask.settings.config import MaskConfig


def hotswap_adapter(
    model: PeftModel, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the masks and the task head of a saved adapter into the tensors of a loaded one, which keeps its name.

    A compiled model goes on without recompiling. Where the adapter is merged, `switch_adapter` between two loaded
    adapters is the way: a merged model is not computed with masks.

    Args:
        model: a PEFT model with an adapter loaded for inference.
        model_name_or_path: folder or Hub repository of the adapter to load.
        adapter_name: the loaded adapter that it replaces.
        torch_device: where its tensors are read to, by default PEFT's choice.
        **kwargs: how the Hub is asked: `revision`, `subfolder`, `token`, `cache_dir`.

    Raises:
        ValueError: if one of the two is not a mask for use, if the loaded one is merged, or if they do not mask the
            same layers or train the same modules, in the same shapes; nothing has changed then.

    Source: the signature is that of `peft.utils.hotswap.hotswap_adapter`, which knows LoRA only.
    """
    old = model.peft_config.get(adapter_name)
    if not isinstance(old, MaskConfig):
        raise ValueError(f"no mask named {adapter_name!r} is loaded; loaded are {sorted(model.peft_config)}.")
    layers = [m for m in model.modules() if isinstance(m, MaskLayer) and adapter_name in m.available_adapters]
    if any(adapter_name in layer.peft_mask_scores for layer in layers):
        raise ValueError(f"the adapter '{adapter_name}' is in training: only one loaded for inference can be replaced.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"the adapter '{adapter_name}' is merged: call unmerge_adapter first, and merge_adapter afterwards."
        )
    new = MaskConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(new, MaskConfig):
        raise ValueError(f"the adapter in '{model_name_or_path}' is not a mask, but of type {new.peft_type}.")
    beside, replaced = (sorted(set(config.modules_to_save or ())) for config in (new, old))
    if beside != replaced:
        raise ValueError(
            f"the adapter in '{model_name_or_path}' has trained {beside} beside its masks, the loaded one {replaced}: "
            "load it under another name with load_adapter."
        )
    if new.trainable_token_indices != old.trainable_token_indices:
        raise ValueError(
            f"the adapter in '{model_name_or_path}' has trained the tokens {new.trainable_token_indices}, the loaded "
            f"one {old.trainable_token_indices}: load it under another name with load_adapter."
        )
    state = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    own = check_own_shapes(model, adapter_name, state)
    if new.checksums is not None:  # `model` has the configuration of the adapter that is replaced
        check(new.checksums, named(state, BITS), own)
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    new.inference_mode = True
    model.peft_config[adapter_name] = cast(Any, new)
