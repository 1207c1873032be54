"""`MaskLayer`: scores or bits of adapters around a base layer, and computing with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from peft_mask.format.fingerprint import UNKNOWN, Fingerprint, fingerprint_of
from peft_mask.format.packing import bits_shape, unpack_bits, zero_positions
from peft_mask.format.record import read_bits
from peft_mask.layers.bits import BitsDict, HeldRecord, check_not_traced
from peft_mask.layers.diffusers_hooks import hooked_by_diffusers, with_hooks_of_diffusers
from peft_mask.layers.hooks import call_with_hooks, parts_in_use
from peft_mask.layers.reading import NoWeight
from peft_mask.layers.rows import BASE, Rows, forward_rows, may_be_mixed, rows_for
from peft_mask.layers.scored_layer import ScoredLayer
from peft_mask.scores.functional import apply_mask, masked_weight
from peft_mask.settings.config import MaskConfig
from peft_mask.tensors.sharded import is_taken_away, is_whole, whole


class MaskLayer(ScoredLayer):
    """What every masked layer shares: scores or bits of each adapter, merging and exact unmerging.

    An adapter that is trained owns `peft_mask_scores[adapter]`: a parameter of the weight's shape, of a shape that
    divides it where one score governs a block or, where only some weights may go, of one score for each of
    `peft_mask_positions[adapter]` (row-major, ascending). An adapter that is only used owns `peft_mask_bits[adapter]`,
    the packed mask: uint8 of shape (rows, ceil(columns / 8)). Never both.
    """

    adapter_layer_names = ("peft_mask_scores",)
    other_param_names = ("peft_mask_bits", "peft_mask_positions")
    _computes_with_zeros = False  # whether a mask that is used is asked for its zeros, not for its bits
    cast_input_dtype_enabled = True  # PEFT's switch for diffusers' layerwise casting; no input is cast here

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # of a base in evaluation no mask is drawn
        self.peft_mask_bits = BitsDict()
        self._disable_adapters = False
        self.keeps_scores = False
        self._fingerprint = UNKNOWN
        self._checks: dict[str, Callable[[], None]] = {}  # of adapters that are loaded by name, until they are
        self._active_adapter = adapter_name
        self.key_in_graph = 0
        self.update_layer(adapter_name, config, name)

    # ---- adapters ----

    def update_layer(self, adapter_name: str, config: MaskConfig, name: str) -> None:
        """Add an adapter: room for packed bits that are to be loaded in inference mode, else starting scores."""
        with onloaded(self):
            weight = self.unmerged_weight()
            self._fingerprint = self._fingerprint_of(weight)
            if config.inference_mode:
                self.peft_mask_bits.wait_for(adapter_name, name, bits_shape(self.mask_shape))
            else:
                self.add_scores(adapter_name, config, name, weight)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.begin_scores(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_available_adapters(self) -> set[str]:
        return {*self.peft_mask_scores.keys(), *self.peft_mask_bits.keys()}

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that this layer has scores or bits of."""
        return self._get_available_adapters()

    def parts(self) -> tuple[nn.Module, ...]:
        """Return what holds the tensors that its masks are made of."""
        return self.peft_mask_scores, self.peft_mask_bits, self.peft_mask_positions

    @property
    def in_features(self) -> int:
        """Width of what goes in, by PEFT's name for it."""
        return self.mask_shape[1]

    @property
    def out_features(self) -> int:
        """Width of what comes out, by PEFT's name for it."""
        return self.mask_shape[0]

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the base weight; if it is sharded or gone, what it was when it was wrapped."""
        if is_taken_away(self.stored.parameter):
            return self._fingerprint
        return self._fingerprint_of(self.unmerged_weight())

    def _fingerprint_of(self, weight: torch.Tensor) -> Fingerprint:
        if weight.is_meta or type(weight) not in (torch.Tensor, nn.Parameter) or weight.shape.numel() == 0:
            return self._fingerprint
        return fingerprint_of(weight, exact=self.stored.exact)

    def mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask: bool, of the weight's shape, True where the weight is kept."""
        return unpack_bits(self.packed_mask(adapter_name), self.mask_shape)

    def packed_mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask as packed bits, uint8 of shape (rows, ceil(columns / 8)).

        Under FSDP2 and ZeRO-3 the scores are gathered first, for which all processes must call this.

        Raises:
            ValueError: if a score is NaN, which has no mask, or if no mask was loaded.
            RuntimeError: under FSDP1, outside the forward pass.
        """
        if adapter_name in self.peft_mask_bits:
            self.peft_mask_bits.check_filled(adapter_name)
            return self.peft_mask_bits[adapter_name]
        scores = whole(self.peft_mask_scores[adapter_name]).detach()
        if scores.isnan().any():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its scores "
                f"contain {int(scores.isnan().sum())} NaN. Did training diverge? Lower the learning rate."
            )
        most = self.zeros_at_rest(adapter_name)
        return self.rule(adapter_name).packed_mask(scores, self.mask_shape, self.positions(adapter_name), most)

    def _zero_positions(self, adapter_name: str) -> torch.Tensor:
        """Return where the adapter's mask is off: row-major positions, int32 wherever these reach."""
        bits = self.packed_mask(adapter_name)
        if adapter_name in self.peft_mask_bits:
            return self.peft_mask_bits.zero_positions(adapter_name, self.mask_shape)
        return zero_positions(bits, self.mask_shape)

    def hold_record(self, adapter_name: str, record: torch.Tensor) -> None:
        """Give an adapter that PEFT knows nothing of its mask, or another one, as a record that was checked.

        Whoever names it in a call computes with it; nobody sets it active, saves or merges it. Calls that name others
        notice nothing.
        """
        if self._computes_with_zeros:
            held = HeldRecord(record, self.unmerged_weight, self._device)
            self.peft_mask_bits.hold_record(adapter_name, held)
        else:
            bits = read_bits(record, self.unmerged_weight)
            self.peft_mask_bits.hold_bits(adapter_name, bits.to(self._device()))

    def _device(self) -> torch.device:
        return self.stored.device

    def let_go(self, adapter_name: str) -> None:
        """Forget the mask of an adapter that came by `hold_record`, if there is one."""
        if adapter_name in self.peft_mask_bits:
            del self.peft_mask_bits[adapter_name]
        self.known_zeros.drop(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.peft_mask_bits.close(adapter_name)
        self.forget_scores(adapter_name)
        self._checks.pop(adapter_name, None)
        self.known_zeros.drop(adapter_name)

    def check_when_filled(self, adapter_name: str, check: Callable[[], None] | None) -> None:
        """Let an adapter whose mask comes by name be checked once it is there; None: not any more."""
        self._checks.pop(adapter_name, None)
        if check is not None:
            self._checks[adapter_name] = check

    def train(self, mode: bool = True) -> MaskLayer:
        # transformers' load_adapter ends with `eval()`, the only word that it says when everything has come
        for adapter_name in [name for name in self._checks if not self.peft_mask_bits.is_open(name)]:
            self._checks.pop(adapter_name)()
        if mode:  # optimizers of `fused=True` and of others write into weights without a trace
            self.known_zeros.drop()
        return super().train(mode)

    # ---- forward ----

    def _under_bits(self, adapter_names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """Return the weight under those adapters that hold bits, and the names of those that are trained."""
        check_not_traced()
        weight = self.stored.values()
        if weight.is_meta:
            raise RuntimeError(
                "cannot mask a weight on the meta device: load the base model's weights, or let accelerate offload "
                "them."
            )
        trained = []
        for adapter_name in adapter_names:
            if adapter_name in self.peft_mask_scores:
                trained.append(adapter_name)
            elif adapter_name in self.peft_mask_bits:
                weight = apply_mask(weight, self.mask(adapter_name))
        return weight, trained

    def masked_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """Return the base weight under the product of these adapters' masks; gradients reach their scores."""
        weight, trained = self._under_bits(adapter_names)
        for adapter_name in trained:
            weight = masked_weight(weight, *self._trained(adapter_name))
        return weight

    def _forward_under(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Call the base layer as it would be with its weight under these adapters, its hooks included."""
        with parts_in_use(self.get_base_layer(), self.parts()):
            return call_with_hooks(self.base_layer, partial(self._compute, adapter_names), *args, **kwargs)

    def _compute(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what the base layer's `forward` would with its weight under these adapters."""
        raise NotImplementedError

    def check_not_merged(self) -> None:
        """Raise a `ValueError` if adapters are merged, so that no row could have another."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_forward(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """Forward each row of the batch under its own adapter; rows of one adapter together."""
        self.check_not_merged()
        available = self._get_available_adapters()

        def forward(name: str, rows: torch.Tensor) -> torch.Tensor:
            return self.base_layer(rows) if name == BASE else self._forward_under([name], rows)

        return forward_rows(x, [name if name in available else BASE for name in rows.repeated(len(x))], forward)

    def _applies_masks(self) -> bool:
        """Return whether masks of active adapters are to be applied, and not merged already; unmerge if disabled."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return False
        return not self.merged and not self._get_available_adapters().isdisjoint(self.active_adapters)

    def _mixed_forward_in_graph(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what a layer does that torch.compile meets while batches of several adapters are computed."""
        return _out_of_graph(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.disable_adapters:
            if torch.compiler.is_compiling() and may_be_mixed():
                return self._mixed_forward_in_graph(*args, **kwargs)
            if (rows := self._rows()) is not None:
                return self._mixed_forward(rows, *args, **kwargs)
        if self._applies_masks():
            return self._forward_under(self.active_adapters, *args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def _rows(self) -> Rows | None:
        """Return whose the rows of the batch are; None if it is the active adapters' alone."""
        # torch.compile cannot follow a context, and need not where no such batch is computed
        return None if torch.compiler.is_compiling() and not may_be_mixed() else rows_for(self)

    def weight_in_force(self) -> torch.Tensor:
        """Return the weight that the layer computes with; gradients reach the scores.

        Some models read a layer's weight instead of calling it, and find this one, as `weight`. Others only ask for its
        dtype: so where there is no such weight, in a batch of several adapters or before a mask is loaded, what is
        returned has shape, dtype and device, and raises a `ValueError` if it is computed with.
        """
        parameter = self.stored.parameter
        names = set(self.active_adapters) if self._applies_masks() else set()
        rows = None if self.disable_adapters or self.merged else self._rows()
        batch = rows and rows.owners
        names = set(batch or names)
        if names.isdisjoint(self._get_available_adapters()) or not is_whole(parameter):
            return parameter
        if batch and len(names) > 1:
            return NoWeight(
                parameter,
                f"cannot mix adapters in one batch: the model reads the weight of a {self._get_name()} instead of "
                f"calling it, and there is one for each of {sorted(names)}. Run one batch for each.",
            )
        if reason := self.peft_mask_bits.reason_not_filled(names):
            return NoWeight(parameter, reason)
        if any(scores.is_meta for name, scores in self.peft_mask_scores.items() if name in names):
            return NoWeight(parameter, f"the adapters {sorted(names)} have no scores yet: load them first.")
        return self.masked_weight(sorted(names))

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with (see `weight_in_force`)."""
        return self.weight_in_force()

    def _get_name(self) -> str:
        return "peft_mask." + super()._get_name()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _out_of_graph(layer: MaskLayer, *args: Any, **kwargs: Any) -> Any:
    return layer.forward(*args, **kwargs)


def onloaded(layer: MaskLayer) -> AbstractContextManager[None]:
    """Return a context in which the base weight of an offloaded layer is there; costs nothing for the others."""
    if hooked := hooked_by_diffusers((layer.get_base_layer(), *layer.parts())):
        return with_hooks_of_diffusers(hooked)
    return onload_layer(layer) if layer.stored.device.type == "meta" else nullcontext()
