"""`MaskModel`: puts masks around a model's layers, and turns them into records on saving and back on loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from peft_mask.format.combine import CombinationType, check_votes, combined_mask
from peft_mask.format.packing import pack_bits
from peft_mask.layers.ahead import found_ahead
from peft_mask.layers.bias import Bias
from peft_mask.layers.drawn_head import draw_head
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.registry import mask_layer_type
from peft_mask.layers.stand_in import ParamWrapper
from peft_mask.model.labels import labels_of, take_labels
from peft_mask.model.loading import state_from_records
from peft_mask.model.merging import MergedAdapters, mask_layers
from peft_mask.model.mixed import copies_in_generation, rows_of
from peft_mask.model.names import compiled_in_place, named_as_in, plain_name
from peft_mask.model.native import make_room, record_sizes
from peft_mask.model.reference import copy_beside, fill_reference, is_reference, masks_to_refer_to, reference_config
from peft_mask.model.replicas import spare_replicas
from peft_mask.model.saving import checksums_of, records_of_adapter
from peft_mask.model.scored import ScoredAdapters, sparsity_aimed_at
from peft_mask.model.targets import checked_shapes, resolve_targets
from peft_mask.settings.config import MaskConfig


class MaskModel(MergedAdapters, ScoredAdapters):
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

    _exact = False

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(compiled_in_place(model), *args, **kwargs)

    # ---- injection ----

    @staticmethod
    def _check_target_module_exists(peft_config: MaskConfig, key: str) -> Any:
        return ScoredAdapters._check_target_module_exists(peft_config, plain_name(key))

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        take_labels(self.model, peft_config)
        resolve_targets(self.model, peft_config)
        for name, other in self.peft_config.items():
            ours, theirs = set(peft_config.target_parameters or []), set(other.target_parameters or [])
            if other is not peft_config and ours and theirs and ours != theirs:
                # where a wrapper stands among those of its module is part of the names in the file
                raise ValueError(
                    f"adapters of one model must name the same target_parameters: '{name}' has {sorted(theirs)}, the "
                    f"new one {sorted(ours)}."
                )
        shapes = checked_shapes(self.model, peft_config)
        if shapes:
            peft_config.target_sparsity = sparsity_aimed_at(peft_config, shapes)
        if peft_config.head == "masked":
            draw_head(self.model, peft_config.head_names, peft_config.head_seed)
        return peft_config

    def _check_new_adapter_config(self, config: MaskConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            heads = [(adapter.head, adapter.head_seed) for adapter in (config, other)]
            if heads[0] != heads[1] and any(head == "masked" for head, _ in heads):
                raise ValueError(
                    f"adapters of one model share a masked head, or train one each: '{name}' has head={heads[1][0]!r} "
                    f"and head_seed={heads[1][1]}, the new one {heads[0][0]!r} and {heads[0][1]}."
                )

    def _add_modules_to_save_to_tie(self, peft_config: MaskConfig, tied_weight_keys: list[str]) -> None:
        def names(saved: str, module: str) -> bool:
            return f".{module}".endswith(f".{saved}")

        embeddings = cast(Any, self.model).get_input_embeddings()
        source = next(name for name, module in self.model.named_modules() if module is embeddings)
        others = [
            saved
            for saved in peft_config.modules_to_save or []
            if not any(names(saved, module) for module in (source, *tied_weight_keys))
        ]
        peft_config.modules_to_save = [*others, source]
        peft_config.modules_to_tie = set(tied_weight_keys)

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
        layer: MaskLayer
        current_key = plain_name(current_key)
        if parameter_name is not None:
            if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
                target.update_layer(adapter_name, peft_config, current_key)
                return
            layer = ParamWrapper(target, adapter_name, peft_config, current_key, parameter_name)
        elif isinstance(target, MaskLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        else:
            layer = mask_layer_type(target)(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an adapter added to others is not trained until it is set active
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        compiled_in_place(model)  # what was compiled since the last adapter
        spare_replicas(model)
        if not is_reference(adapter_name, self.peft_config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            make_room(model, adapter_name, self.peft_config[adapter_name])
            return
        masks = masks_to_refer_to(model)
        self.peft_config[adapter_name] = reference_config(self.peft_config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        fill_reference(model, masks)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also copies `child.weight` over on unloading, which a task head of several layers does not have. Masked
        # layers keep their base layer whole and are made on its device, so there is nothing to copy.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        trained = {
            layer: layer.peft_mask_scores[adapter_name]
            for _, layer in self._scored_layers(adapter_name, required=False)
        }
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:  # PEFT's idea of that is float32, ours what the configuration says
            dtype = getattr(torch, self.peft_config[adapter_name].scores_dtype)
            for layer, scores in trained.items():
                if scores.dtype != torch.float64:  # which a user has chosen for the whole model
                    scores.data = scores.data.to(dtype)
                # PEFT makes new parameters of 16-bit ones. It does that in a resume, too, after the optimizer was made.
                layer.peft_mask_scores[adapter_name] = scores

    # ---- adapters made of others ----

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "intersection",
    ) -> None:
        """Add an adapter whose mask is what others come to together (see `combined_mask`).

        The new adapter holds bits and is not trained. A layer that one of the others does not mask is kept whole in its
        view. A task head is a copy of that of the first of `adapters`, since there is no vote between heads.

        Args:
            adapters: names of loaded adapters, trained or for inference.
            weights: how much the vote of each counts; positive.
            adapter_name: name of the new adapter.
            combination_type: `"intersection"`, `"union"` or `"majority"`.

        Raises:
            ValueError: if an adapter is not there, the new name is taken, or the votes have no meaning; nothing has
                changed then.

        Source: the signature is that of LoRA's `add_weighted_adapter`.
        """
        check_votes(adapters, weights, combination_type)
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"no adapters named {missing}; loaded are {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter named '{adapter_name}' already: delete it, or take another name.")
        layers = {
            plain_name(name): layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, MaskLayer) and not layer.available_adapters.isdisjoint(adapters)
        }
        self.peft_config[adapter_name] = _combined_config([self.peft_config[name] for name in adapters], layers)
        self.inject_adapter(self.model, adapter_name)
        for layer in mask_layers(self.model):
            if adapter_name not in layer.available_adapters:
                continue
            kept = torch.ones(layer.mask_shape, dtype=torch.bool, device=layer.stored.device)
            masks = [layer.mask(name) if name in layer.available_adapters else kept for name in adapters]
            bits = pack_bits(combined_mask(masks, weights, combination_type))
            layer.peft_mask_bits.fill(adapter_name, bits)
        copy_beside(self.model, adapters[0], adapter_name)

    # ---- around a forward pass, and around `generate` ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT asks this of a method that can mix adapters in one batch, and drops `adapter_names` silently otherwise.
        if (adapter_names := kwargs.get("adapter_names")) is None:
            with found_ahead(self.model):
                yield
            return
        with rows_of(self.model, adapter_names, copies_in_generation(self.model, kwargs), self._exact):
            yield

    def set_exact(self, exact: bool) -> None:
        """Say whether rows of a batch of several adapters are to have the bits that merged weights give.

        By default they need not: a few tokens of each adapter are corrected by what its mask switches off, which adds
        up the same numbers in another order and is several times as fast.

        Args:
            exact: whether they are to. Holds for calls from now on.
        """
        self._exact = exact

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
        # PEFT looks for heads and embeddings in this mapping, a copy of what it was given, by their names in `model`
        state_dict.update(named_as_in(model, state_dict))
        tensors = records_of_adapter(model, adapter_name, state_dict, config.portable)
        if tensors:  # the configuration is written after them, and beside them
            config.record_bytes = record_sizes(tensors, adapter_name)
            config.checksums = checksums_of(model, config, adapter_name, state_dict, tensors)
            config.id2label = labels_of(model, config.id2label)
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # what an adapter trained of an embedding comes twice: by PEFT's name for it, and by that in the file
        key = key.replace(f".modules_to_save.{adapter_name}.", ".")
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return state_from_records(model, config, adapter_name, named_as_in(model, state_dict))


def _combined_config(configs: list[MaskConfig], layers: Mapping[str, MaskLayer]) -> MaskConfig:
    """Return the configuration of an adapter that masks all these layers, after the first of `configs`."""
    sparsities = [config.target_sparsity for config in configs if config.target_sparsity is not None]
    return dataclasses.replace(
        configs[0],
        inference_mode=True,
        # parts of what a module masks carry its name already, and all that have target_parameters have the same
        target_parameters=next((config.target_parameters for config in configs if config.target_parameters), None),
        target_modules={
            name
            for name, layer in layers.items()
            if ".base_layer" not in name and not isinstance(layer, (ParamWrapper, Bias))
        },
        mask_biases=any(config.mask_biases for config in configs),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_bytes=None,
        checksums=None,
        target_sparsity=max(sparsities, default=None) if configs[0].binarizer == "topk" else None,
    )
