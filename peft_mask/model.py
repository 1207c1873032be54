"""`MaskModel`: puts masks around a model's layers, and turns them into records on saving and back on loading."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mask.config import MaskConfig
from peft_mask.layer import Linear, MaskLayer, onloaded, unsupported_reason
from peft_mask.state import records_of_adapter, state_from_records

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class MaskModel(BaseTuner):
    """A model whose weights are kept or switched off by learned masks.

    Made by `peft.get_peft_model(model, MaskConfig(...))`. The base weights are never changed, except that
    `merge_adapter` writes zeros into them and `unmerge_adapter` puts back what was there, bit for bit.

    Args:
        model: the base model.
        peft_config: a `MaskConfig`, or a mapping from adapter name to `MaskConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create scores on the meta device, to be filled by loading.

    Source: Zhao et al. 2020, "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models".
    """

    prefix = "peft_mask_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's declaration; see `default_target_modules`

    # ---- injection ----

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        if peft_config.task_type in _TASKS_WITH_HEAD:
            missing = [name for name in head_modules(self.model) if name not in (peft_config.modules_to_save or [])]
            peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *missing]
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model, peft_config)
        _maybe_include_all_linear_layers(peft_config, self.model)
        self._check_targets(peft_config)
        return peft_config

    def _check_targets(self, config: MaskConfig) -> None:
        """Refuse, before anything changes, what could not be masked or would be masked without effect."""
        tied = _tied_weights(self.model)
        for name, module in _outermost_modules(self.model):
            if not name or not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, BaseTunerLayer) and not isinstance(module, MaskLayer):
                raise ValueError(
                    f"cannot mask '{name}': it already carries an adapter of type {type(module).__module__}. Masks do "
                    "not combine with other methods in one layer; unload that adapter first."
                )
            base = module.get_base_layer() if isinstance(module, MaskLayer) else module
            if reason := unsupported_reason(base):
                raise ValueError(
                    f"Target module '{name}' of type {type(base).__name__} is not supported: {reason}. Leave it out of "
                    "target_modules, or name it in exclude_modules."
                )
            if others := tied.get(cast(nn.Parameter, base.weight), set()) - {name}:
                raise ValueError(
                    f"cannot mask '{name}': its weight is tied to {sorted(others)}, which would see it unmasked until "
                    "merging and masked afterwards. Leave it out of target_modules, or untie the weights first."
                )

    def _create_and_replace(
        self,
        peft_config: MaskConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MaskLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = Linear(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an adapter added to others is not trained until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also copies `child.weight` over on unloading, which a task head of several layers does not have. Masked
        # layers keep their base layer whole and are made on its device, so there is nothing to copy.
        setattr(parent, child_name, new_module)

    # ---- merging ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; if anything goes wrong, no weight has changed.

        Args:
            adapter_names: adapters to merge, by default the active ones.
            safe_merge: check the merged weights for NaN and infinities before writing them.
        """
        self._check_merge_allowed()
        self._merge(list(_mask_layers(self.model)), adapter_names, safe_merge)

    def _merge(self, layers: list[MaskLayer], adapter_names: list[str] | None, safe_merge: bool = False) -> None:
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
        for layer in _mask_layers(self.model):
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
        else:
            self.unmerge_adapter()
        return cast(nn.Module, super()._unload_and_optionally_merge(merge=False, progressbar=progressbar))

    def _is_merged(self, adapter_name: str) -> bool:
        return any(adapter_name in layer.merged_adapters for layer in _mask_layers(self.model))

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
        layers = list(_mask_layers(self.model))
        for layer in layers:
            with onloaded(layer):
                layer.unmerge()
        if adapter_name is None:
            self.disable_adapter_layers()
            return
        self.set_adapter(adapter_name)
        if any(layer.disable_adapters for layer in layers):
            self.enable_adapter_layers()
        self._merge(layers, [adapter_name])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT asks this of a method that can mix adapters in one batch, and drops `adapter_names` silently otherwise.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "peft_mask cannot mix adapters in one batch yet. Run the rows of each adapter on their own, after "
                "set_adapter(name) or switch_adapter(name)."
            )
        yield

    # ---- saving and loading ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return records_of_adapter(model, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return state_from_records(model, config, adapter_name, state_dict)


def _mask_layers(model: nn.Module) -> Iterator[MaskLayer]:
    return (module for module in model.modules() if isinstance(module, MaskLayer))


def _outermost_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of `model`, a tuner layer as one: not what it wraps."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        yield name, module


def _tied_weights(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """Map every parameter called `weight` that several modules share to the names of these modules."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight, set()).add(name.removesuffix(".base_layer"))
    return {weight: names for weight, names in owners.items() if len(names) > 1}


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules with parameters that stand outside the backbone: the task head.

    They are newly initialized when a pretrained backbone is loaded, so they must be trained and saved: the classifier,
    and with it DeBERTa's pooler, DistilBERT's `pre_classifier`, ModernBERT's `head` and so on.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def default_target_modules(model: nn.Module, config: MaskConfig) -> set[str]:
    """Return the names of every linear layer of the backbone, as `"all-linear"` but without embeddings and heads.

    Raises:
        ValueError: if `model` is not a transformers model, whose backbone is known.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} is not a transformers model, so "
            'its backbone is not known. `target_modules="all-linear"` masks every linear layer.'
        )
    backbone = "" if model.base_model is model else model.base_model_prefix + "."
    tied = _tied_weights(model)
    output_embeddings = model.get_output_embeddings()
    names = set()
    for name, module in _outermost_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if (
            isinstance(base, (nn.Linear, Conv1D))
            and name.startswith(backbone)
            and base is not output_embeddings
            and base.weight not in tied
        ):
            names.add(name)
    if config.layers_to_transform is None:
        return names
    # PEFT looks at layer indices for suffixes only, not for full names.
    suffixes = copy.copy(config)
    suffixes.target_modules = {name.rpartition(".")[2] for name in names}
    return {name for name in names if check_target_module_exists(suffixes, name)}
