"""What is set of an adapter with scores: its budget, the weights that have a score, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_mask.layers.mask_layer import MaskLayer, onloaded
from peft_mask.model.matching import listed
from peft_mask.model.merging import named_mask_layers
from peft_mask.model.saving import adapter_bytes
from peft_mask.scores.budget import expected_bytes, sparsity_for_bytes
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import check_can_change


class ScoredAdapters(BaseTuner):
    """The methods of a masked model that need the scores of an adapter."""

    def set_target_sparsity(self, sparsity: float, adapter_name: str | None = None) -> None:
        """Move the budget of an adapter that has scores: the whole curve of accuracy against bytes from one training.

        Fewer zeros than trained with are the strongest of these; the scores do not change. `adapter_config.json` will
        say the new sparsity.

        Args:
            sparsity: fraction of the masked weights to switch off.
            adapter_name: which adapter, by default the active one.

        Raises:
            ValueError: if the sparsity is out of range, or the adapter has no budget or no scores.
        """
        name = adapter_name or self._only_active()
        config: MaskConfig = self.peft_config[name]
        self._check_has_budget(name)
        if not 0.0 < sparsity <= largest_sparsity(config):
            raise ValueError(f"sparsity must be above 0 and at most {largest_sparsity(config):g}, got {sparsity!r}.")
        for _, layer in self._scored_layers(name):
            layer.set_sparsity(name, sparsity)
        config.target_sparsity, config.target_bytes = sparsity, None

    def set_target_bytes(self, target_bytes: int, adapter_name: str | None = None) -> int:
        """Move the budget of an adapter that has scores to what fills a file of the given size.

        `MaskConfig(target_bytes=...)` knows before training what a mask without any order in it would take; what
        training made is coded a few per cent shorter or longer. `MaskCallback` calls this at the end of training.

        Args:
            target_bytes: size of `adapter_model.safetensors` without a task head.
            adapter_name: which adapter, by default the active one.

        Returns:
            The size reached.

        Raises:
            ValueError: if the size is out of reach, or the adapter has no budget or no scores.
        """
        name = adapter_name or self._only_active()
        config: MaskConfig = self.peft_config[name]
        self._check_has_budget(name)

        def size(sparsity: float) -> int:
            for _, layer in self._scored_layers(name):
                layer.set_sparsity(name, sparsity)
            return adapter_bytes(self.model, name, config.portable)

        before = config.target_sparsity
        try:
            sparsity = sparsity_for_bytes(size, target_bytes, fullest_sparsity(config))
        except BaseException:
            size(cast(float, before))
            raise
        config.target_sparsity, config.target_bytes = sparsity, target_bytes
        return size(sparsity)

    def set_candidates(self, positions: Mapping[str, torch.Tensor], adapter_name: str | None = None) -> None:
        """Give the scores of an adapter to other weights: chosen by data, by a rule of one's own, or again in training.

        A weight that had a score keeps it, a new candidate starts at zero. Parameters stay the same tensors, so that an
        optimizer goes on with them; what it remembers of each score (nothing, with `create_mask_optimizer`'s default)
        it then takes for another's.

        Args:
            positions: for each masked module, by its name in the base model, which weights: integers, distinct, in
                row-major order of the weight, as many as there are scores.
            adapter_name: which adapter, by default the active one.

        Raises:
            ValueError: if the adapter has scores for all weights, or the positions are not such; nothing has changed.
        """
        name = adapter_name or self._only_active()
        layers = self._changeable_layers(name, "set_candidates")
        _check_modules(f"the candidates of '{name}'", positions, layers)
        changes = {
            module: layer.checked_candidates(name, positions[module], module) for module, layer in layers.items()
        }
        for module, layer in layers.items():
            layer.set_candidates(name, changes[module])

    def protect(self, positions: Mapping[str, torch.Tensor | Collection[int]], adapter_name: str | None = None) -> None:
        """Keep weights whatever is learned, such as those that `super_weights` finds.

        They lose their scores, and the largest weights without one get them in their place. Nothing else changes: the
        number of candidates, what other scores count, the file. Once it is saved, an adapter is its zeros, of which
        these are none. It holds until candidates are chosen anew: by `set_candidates`, or where a saved adapter is
        loaded to be trained on. Call it again then.

        Args:
            positions: by the names of masked modules in the base model, which weights: integers, in row-major order.
            adapter_name: which adapter, by default the active one.

        Raises:
            ValueError: if one of the names is no masked module's, a position is out of range, or the adapter has scores
                for all weights; nothing has changed.

        Example:
            >>> import torch
            >>> from peft import get_peft_model
            >>> from peft_mask import MaskConfig
            >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 10)), MaskConfig(target_modules=["0"]))
            >>> layer = model.base_model.model[0]
            >>> largest = layer.base_layer.weight.abs().argmax()
            >>> bool(torch.isin(largest, layer.positions("default")))
            True
            >>> model.base_model.protect({"0": largest})
            >>> bool(torch.isin(largest, layer.positions("default")))
            False
        """
        name = adapter_name or self._only_active()
        layers = self._changeable_layers(name, "protect")
        if unknown := sorted(positions.keys() - layers.keys()):
            raise ValueError(
                f"cannot protect weights of {unknown}: the adapter '{name}' does not mask such modules. It masks "
                f"{listed(sorted(layers), 5)}."
            )
        changes = {}
        for module, protected in positions.items():
            layer = layers[module]
            with onloaded(layer):
                own = protected if isinstance(protected, torch.Tensor) else _as_tensor(protected)
                changes[module] = layer.candidates_without(name, own, module)
        for module, new in changes.items():
            layers[module].set_candidates(name, new)

    def set_scores(
        self,
        scores: Mapping[str, torch.Tensor] | Callable[[str, torch.Tensor], torch.Tensor],
        adapter_name: str | None = None,
    ) -> None:
        """Give an adapter other scores: where its training starts, if not where `init_weights` puts it.

        Scores are relative to the threshold: with `"threshold"` a weight is off where its score is below zero, with
        `"bernoulli"` a score is a log odds, with `"topk"` and `"n:m"` their order is what counts. Parameters stay the
        same tensors. Do this before the model is sharded.

        Args:
            scores: for each masked module, by its name in the base model, its scores; or a function that computes them
                from that name and the base weight. Floating tensors of the shape of the parameter, which is that
                of the weight if every weight has a score; where only candidates have, of either shape.
            adapter_name: which adapter, by default the active one.

        Raises:
            ValueError: if they are for other modules than are masked, of another shape, or not finite; nothing has
                changed.

        Example:
            >>> import torch
            >>> from peft import get_peft_model
            >>> from peft_mask import MaskConfig
            >>> config = MaskConfig(target_modules=["0"], binarizer="threshold", candidates=None)
            >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
            >>> model.base_model.set_scores(lambda name, weight: weight)  # positive weights are kept
            >>> layer = model.base_model.model[0]
            >>> torch.equal(layer.mask("default"), layer.base_layer.weight >= 0)
            True
        """
        name = adapter_name or self._only_active()
        layers = self._changeable_layers(name, "set_scores")
        if callable(scores):
            given = {}
            for module, layer in layers.items():
                with onloaded(layer):
                    given[module] = scores(module, layer.unmerged_weight().detach())
        else:
            given = dict(scores)
        _check_modules(f"the scores of '{name}'", given, layers)
        new = {module: _checked_scores(name, module, layer, given[module]) for module, layer in layers.items()}
        with torch.no_grad():
            for module, layer in layers.items():
                layer.peft_mask_scores[name].copy_(new[module])
                layer.rest(name, None)  # what a mask of other scores was held to is no matter of these

    def _only_active(self) -> str:
        if len(self.active_adapters) != 1:
            raise ValueError(f"name the adapter: {self.active_adapters} are active.")
        return self.active_adapters[0]

    def _scored_layers(self, adapter_name: str, required: bool = True) -> list[tuple[str, MaskLayer]]:
        layers = named_mask_layers(self.model)
        found = [(name, layer) for name, layer in layers if adapter_name in layer.peft_mask_scores]
        if required and not found:
            raise ValueError(
                f"the adapter '{adapter_name}' has no scores, only the mask they came to: load it with "
                "is_trainable=True from a checkpoint that has them, or do this before saving."
            )
        return found

    def _changeable_layers(self, adapter_name: str, what: str) -> dict[str, MaskLayer]:
        layers = dict(self._scored_layers(adapter_name))
        for layer in layers.values():
            check_can_change(layer.peft_mask_scores[adapter_name], what)
        return layers

    def _check_has_budget(self, adapter_name: str) -> None:
        if self.peft_config[adapter_name].binarizer != "topk":
            raise ValueError(
                f"the adapter '{adapter_name}' has no budget: its binarizer is "
                f'{self.peft_config[adapter_name].binarizer!r}. Train it with binarizer="topk".'
            )


def trained_scores(model: nn.Module) -> Iterator[tuple[str, MaskLayer, str]]:
    """Yield name, layer and adapter of all scores of a model that are trained; the name holds the adapter's."""
    for name, module in model.named_modules():
        if isinstance(module, MaskLayer):
            for adapter_name, parameter in module.peft_mask_scores.items():
                if parameter.requires_grad:
                    yield f"{name}.{adapter_name}", module, adapter_name


def _as_tensor(positions: Collection[int]) -> torch.Tensor:
    return torch.tensor([*positions]) if positions else torch.zeros(0, dtype=torch.long)


def _check_modules(what: str, given: Mapping[str, Any], layers: Mapping[str, MaskLayer]) -> None:
    if given.keys() != layers.keys():
        raise ValueError(
            f"cannot set {what}: they are for other modules than it masks. "
            f"Missing: {sorted(layers.keys() - given.keys()) or 'none'}; "
            f"not masked: {sorted(given.keys() - layers.keys()) or 'none'}."
        )


def _checked_scores(adapter_name: str, module: str, layer: MaskLayer, scores: torch.Tensor) -> torch.Tensor:
    parameter, positions = layer.peft_mask_scores[adapter_name], layer.positions(adapter_name)
    scores = scores.detach()
    shapes = [parameter.shape] if positions is None else [layer.mask_shape, parameter.shape]
    if scores.shape not in shapes or not scores.is_floating_point():
        raise ValueError(
            f"cannot set the scores of '{module}': expected a floating tensor of shape "
            f"{' or '.join(str(tuple(shape)) for shape in shapes)}, got {scores.dtype} of shape {tuple(scores.shape)}."
        )
    if not scores.isfinite().all():
        raise ValueError(f"cannot set the scores of '{module}': {int((~scores.isfinite()).sum())} are not finite.")
    if scores.shape == parameter.shape or positions is None:
        return scores
    return scores.take(positions.to(scores.device, torch.int64))


def largest_sparsity(config: MaskConfig) -> float:
    """Return the largest sparsity that an adapter can have."""
    return 1.0 if config.candidates is None else config.candidates


def sparsity_aimed_at(config: MaskConfig, shapes: Mapping[str, Sequence[int]]) -> float | None:
    """Return the sparsity that a configuration gives to masks of these shapes, by name: as it says, or for its bytes.

    Raises:
        ValueError: if `target_bytes` is out of reach.
    """
    if config.target_bytes is None or config.target_sparsity is not None:
        return config.target_sparsity
    among = known_to_readers(config)
    return sparsity_for_bytes(
        lambda sparsity: expected_bytes(shapes, sparsity, among), config.target_bytes, fullest_sparsity(config)
    )


def known_to_readers(config: MaskConfig) -> float:
    """Return the fraction of the weights that readers of the file will look for zeros in."""
    if config.portable or config.candidates is None or config.candidate_rule != "magnitude":
        return 1.0
    return config.candidates


def fullest_sparsity(config: MaskConfig) -> float:
    """Return the sparsity of the largest file: half of the weights in question, as more zeros are easier to code."""
    return min(largest_sparsity(config), known_to_readers(config) / 2)
