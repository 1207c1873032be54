"""What `MaskConfig.checksums` says of a file that is about to be written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_mask.format.checksums import checksums_for
from peft_mask.model.beside import own_in
from peft_mask.model.embeddings import is_resized, tidy_embeddings
from peft_mask.model.names import BITS, FOR_TRAINING, module_name, named
from peft_mask.settings.config import MaskConfig


def checksums_of(
    model: nn.Module,
    config: MaskConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """Return the checksums of what stands beside an adapter's records, or None if nothing does.

    Args:
        model: the model.
        config: the adapter's configuration.
        adapter_name: which adapter.
        state_dict: PEFT's own copy of the state dict of `model`, from which it adds heads and embeddings to the file.
            Of the embeddings it is left what can be loaded again (see `tidy_embeddings`).
        tensors: records and scores, by name with the adapter's.

    Raises:
        ValueError: if what the adapter trained whole could not be loaded again; the message names it.
    """
    suffix = f".{adapter_name}"
    beside = dict(own_in(model, adapter_name, state_dict))
    whole = tidy_embeddings(model, adapter_name, state_dict)
    if whole and is_resized(model, config):  # else PEFT does not save them, or they are the base's
        beside |= {module_name(name): (tensor, ()) for name, tensor in whole.items()}
    for key, tensor in tensors.items():
        if (name := key.removesuffix(suffix)).endswith(FOR_TRAINING):
            beside[module_name(name)] = tensor, ()
    return checksums_for(named(tensors, BITS + suffix), beside)
