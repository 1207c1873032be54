"""Masks written into the weights of a whole model, and put back: all layers or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TrainableTokensWrapper
from torch import nn

from peft_mask.layers.diffusers_hooks import check_can_write
from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.embeddings import thaw
from peft_mask.model.names import plain_name
from peft_mask.model.replicas import spare_no_more


def mask_layers(model: nn.Module) -> Iterator[MaskLayer]:
    """Yield the masked layers of a model."""
    return (module for module in model.modules() if isinstance(module, MaskLayer))


def named_mask_layers(model: nn.Module) -> Iterator[tuple[str, MaskLayer]]:
    """Yield the masked layers of a model with their names, without what wrappers add to these."""
    return ((plain_name(name), module) for name, module in model.named_modules() if isinstance(module, MaskLayer))


class MergedAdapters(BaseTuner):
    """The methods of a masked model that write into its weights."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; if anything goes wrong, no weight has changed.

        Args:
            adapter_names: adapters to merge, by default the active ones.
            safe_merge: check the merged weights for NaN and infinities before writing them.
        """
        self._check_merge_allowed()
        self._merge(list(mask_layers(self.model)), adapter_names, safe_merge)

    def _merge(self, layers: list[MaskLayer], adapter_names: list[str] | None, safe_merge: bool = False) -> None:
        check_can_write(self.model)
        depths = [layer.merge_depth for layer in layers]
        try:
            for layer in layers:
                with onloaded(layer):
                    layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer, depth in zip(layers, depths, strict=True):
                with onloaded(layer):
                    layer.unmerge_to(depth)
            raise

    def unmerge_adapter(self) -> None:
        """Put the weights of the base model back, bit for bit."""
        self._unmerge(list(mask_layers(self.model)))

    def _unmerge(self, layers: list[MaskLayer]) -> None:
        if any(layer.merged for layer in layers):
            check_can_write(self.model)
        for layer in layers:
            with onloaded(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:  # all layers before the first is replaced, so that a failure leaves the model whole
            unmerged = [name for name in adapter_names or self.active_adapters if not self._is_merged(name)]
            if unmerged:
                self.merge_adapter(adapter_names=unmerged, safe_merge=safe_merge)
            for module in self.model.modules():
                if isinstance(module, TrainableTokensWrapper):
                    module.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge_adapter()
        unloaded = cast(nn.Module, super()._unload_and_optionally_merge(merge=False, progressbar=progressbar))
        thaw(unloaded)
        spare_no_more(unloaded)
        return unloaded

    def _is_merged(self, adapter_name: str) -> bool:
        return any(adapter_name in layer.merged_adapters for layer in mask_layers(self.model))

    def switch_adapter(self, adapter_name: str | None) -> None:
        """Serve another adapter at full speed: unmerge what is merged, then activate and merge `adapter_name`.

        The base weights are scattered into in place: same tensors, same addresses, no second copy. The cost is
        proportional to the number of weights that are off.

        Args:
            adapter_name: name of a loaded adapter, or None for the bare base model (adapters are then disabled).

        Raises:
            ValueError: if there is no adapter of that name; nothing has changed then.
        """
        if adapter_name is not None and adapter_name not in self.peft_config:
            raise ValueError(f"no adapter named {adapter_name!r}; loaded are {sorted(self.peft_config)}.")
        layers = list(mask_layers(self.model))
        self._unmerge(layers)
        if adapter_name is None:
            self.disable_adapter_layers()
            return
        self.set_adapter(adapter_name)
        if any(layer.disable_adapters for layer in layers):
            self.enable_adapter_layers()
        self._merge(layers, [adapter_name])
