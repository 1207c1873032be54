"""Linear layers whose masks are used and not trained: rows of several adapters, and adapters that are not merged."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from peft_mask.layers.bias import LayerWithBias
from peft_mask.layers.bits import check_not_traced
from peft_mask.layers.correction import Zeros, corrected_product, zeros_of
from peft_mask.layers.hooks import call_with_hooks, parts_in_use
from peft_mask.layers.in_graph import can_be_in_graph, in_graph
from peft_mask.layers.patched import Group, aligned, can_patch, patched_products
from peft_mask.layers.rows import BASE, Rows, forward_rows

WIDE = 128  # tokens of one adapter from which on a patched weight costs no more than the correction, and is exact
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ServedLinear(LayerWithBias):
    """A masked linear layer that computes with loaded masks without forming a masked weight for each.

    Few tokens of an adapter get the product with the base weight, one for all of the batch, and the sparse correction
    of their adapter. Many tokens, and all if it is to be exact, are multiplied with a copy of the weight that zeros are
    written into. What neither is made for takes the way of every masked layer: scores, gradients of the weight, weights
    in parts.
    """

    _computes_with_zeros = True
    _base_is_the_product = True  # whether the base layer computes `x W^T + b` and nothing else

    @property
    def _transposed(self) -> bool:
        """Whether the weight is stored as in transformers' `Conv1D`."""
        return False

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base weight as it is multiplied with `x`."""
        return self.stored.values()

    def _served_weight(self, adapter_names: Collection[str], x: torch.Tensor) -> torch.Tensor | None:
        """Return the base weight if all of these adapters can be used in one of the two ways, else None."""
        if len(scores := self.peft_mask_scores) and not scores.keys().isdisjoint(adapter_names):
            return None
        weight = self._weight_for(x)
        if torch.is_grad_enabled() and weight.requires_grad:
            return None
        return weight if can_patch(weight) and weight.dtype in _DTYPES else None

    def _off(self, adapter_names: Sequence[str], weight: torch.Tensor) -> list[torch.Tensor]:
        """Return where each of these adapters is off in a weight that `_weight_for` returned: row-major positions."""
        held = self.peft_mask_bits
        return [
            # a record takes time to read: what was read of it is kept once, as what tokens are corrected by
            self._zeros([name], weight)[0].positions(weight.shape[1], transposed=self._transposed)
            if held.holds_record(name)
            else self._zero_positions(name).long()
            for name in adapter_names
            if name in held
        ]

    # ---- the whole batch under the same adapters ----

    def _patched(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor | None:
        """Return the output under these adapters, to the bit that of merged weights; None if it takes another way.

        With gradients it does: the backward pass would read the copy, patched for others by then.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return None
        check_not_traced()
        if (weight := self._served_weight(adapter_names, x)) is None:
            return None
        group = Group(x, self._off(adapter_names, weight), self._bias_for(weight, *adapter_names))
        return next(patched_products([group], weight, transposed=self._transposed))

    # ---- rows of several adapters ----

    def _mixed_forward(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        self.check_not_merged()
        with parts_in_use(self.get_base_layer(), self.parts()):
            return call_with_hooks(self.base_layer, partial(self._compute_rows, rows), x)

    def output_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor without values that is like the output for `x`."""
        return x.new_empty(*x.shape[:-1], self.out_features)

    def _mixed_forward_in_graph(self, x: torch.Tensor) -> Any:
        if can_be_in_graph(x, self.parameters()):
            return in_graph(self.key_in_graph, x)
        return super()._mixed_forward_in_graph(x)

    def _compute_rows(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        check_not_traced()
        known = self.available_adapters & rows.owners
        if not known:
            rows.repeated(len(x))  # raises if there are not as many
            return self._compute_base(x)
        weight = self._served_weight(known, x)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if weight is None or (rows.exact and differentiable):
            owners = [name if name in known else BASE for name in rows.repeated(len(x))]
            return forward_rows(x, owners, self._compute_alone)
        many: float = WIDE / max(x.shape[1:-1].numel(), 1)
        if differentiable:
            many = math.inf
        elif rows.exact or len(rows.owners) == 1:  # alone in the batch, a copy of the weight costs no more
            many = 0
        small, large, order, back = rows.groups(len(x), known, many, x.device)
        first = small if self._base_is_the_product else {name: small[name] for name in small if name != BASE}
        counts = [sum(first.values()), sum(small.values()) - sum(first.values()), *large.values()]
        corrected, base, *parts = (x if order is None else x[order]).split(counts)
        outputs = [self._corrected(corrected, first, weight)] if first else []
        outputs += [self._compute_base(base)] if len(base) else []
        if large:
            outputs.append(self._patched_rows(parts, list(large), weight))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if back is None else output[back]

    def _patched_rows(self, parts: Sequence[torch.Tensor], names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Return the output for rows of one adapter after another, to the bit those of merged weights."""
        sizes = [part.shape[:-1].numel() for part in parts]
        output = weight.new_empty(sum(sizes), self.out_features)
        # autocast makes products of another dtype, and what has a gradient, as a bias may, is not written into others
        alone = torch.is_grad_enabled() or torch.is_autocast_enabled(weight.device.type)
        places = [None] * len(parts) if alone else output.split(sizes)
        groups = [
            Group(aligned(part), self._off([name], weight), self._bias_for(weight, name), place)
            for part, name, place in zip(parts, names, places, strict=True)
        ]
        found = list(patched_products(groups, weight, transposed=self._transposed))
        if alone:
            return torch.cat(found)
        return output.view(sum(map(len, parts)), *parts[0].shape[1:-1], self.out_features)

    def _compute_alone(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._compute_base(x) if name == BASE else self._compute([name], x)

    def _compute_base(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base layer does, without its hooks."""
        base = self.get_base_layer()
        return cast(torch.Tensor, type(base).forward(base, x))

    def _corrected(self, x: torch.Tensor, sizes: Mapping[str, int], weight: torch.Tensor) -> torch.Tensor:
        """Return the output for rows of one adapter after another, and of no adapter behind them."""
        own = {name: count for name, count in sizes.items() if name != BASE}
        if not own:
            return self._compute_base(x)
        tokens, each = x.reshape(-1, x.shape[-1]), x.shape[1:-1].numel()
        counts, bias = [count * each for count in own.values()], self._biases(sizes, each, weight)
        product = corrected_product(tokens, counts, self._zeros(own, weight), weight, bias, transposed=self._transposed)
        return product.view(*x.shape[:-1], product.shape[-1])

    def _biases(self, sizes: Mapping[str, int], each: int, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the bias of every token, or one for all."""
        mask = self._bias_mask()
        if mask is None or mask.available_adapters.isdisjoint(sizes):
            return self._bias_for(weight)
        return torch.cat(
            [mask.masked_weight([name]).to(weight.dtype).expand(count * each, -1) for name, count in sizes.items()]
        )

    def _bias_for(self, weight: torch.Tensor, *adapter_names: str) -> torch.Tensor | None:
        bias = self._bias(adapter_names)
        return None if bias is None else bias.to(weight.dtype)  # a quantized layer computes in a dtype of its own

    def hold_record(self, adapter_name: str, record: torch.Tensor) -> None:
        super().hold_record(adapter_name, record)
        weight = self.stored.values()
        if self._base_is_the_product and can_patch(weight):  # else what it is multiplied with is known in the call only
            self._zeros([adapter_name], weight)  # now, and not in the first call, which others wait for

    def _zeros(self, adapter_names: Iterable[str], weight: torch.Tensor) -> list[Zeros]:
        """Return what adapters switch off in a weight that `_weight_for` returned."""
        held = self.peft_mask_bits

        def gather(name: str) -> Zeros:
            positions = held.zero_positions(name, self.mask_shape, keep=not held.holds_record(name))
            return zeros_of(positions, weight, transposed=self._transposed)

        bits = {name: held.kept(name) for name in adapter_names}
        return self.known_zeros.of(bits, self.stored.parameter, weight.dtype, gather)
