"""Masked embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from peft_mask.format.packing import unpack_bits
from peft_mask.layers.bits import check_not_traced
from peft_mask.layers.hooks import call_with_hooks, parts_in_use
from peft_mask.layers.in_graph import can_be_in_graph, in_graph
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.layers.rows import BASE, Rows
from peft_mask.scores.functional import apply_mask, masked_weight


class Embedding(MaskLayer):
    """A masked `nn.Embedding`. Only the rows looked up are masked, whatever the size of the table.

    The mask has the shape of the table, (embeddings, dimensions). As in the base layer, the row at `padding_idx` gets
    no gradient, and neither do its scores.
    """

    looks_for_zeros = False
    _computes_with_zeros = True

    @staticmethod
    def input_dimension_of(base_layer: nn.Module) -> int | None:
        return None

    @property
    def in_features(self) -> int:
        return self.mask_shape[0]

    @property
    def out_features(self) -> int:
        return self.mask_shape[1]

    def _compute(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = cast(nn.Embedding, self.get_base_layer())
        rows, index = x.unique(return_inverse=True)
        table = self.masked_rows(adapter_names, rows)
        if base.padding_idx is not None:
            table = torch.where((rows == base.padding_idx).unsqueeze(1), table.detach(), table)
        output = F.embedding(index, table, scale_grad_by_freq=base.scale_grad_by_freq)
        if (scale := self._get_embed_scale()) is not None:
            output = output * scale.to(output.dtype)
        return output

    def _mixed_forward(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """Look up all rows at once, and write zeros where the adapter of each is off: to the bit what it does alone."""
        known = self.available_adapters & rows.owners
        if any(name in self.peft_mask_scores for name in known) or self._needs_gradient():
            return super()._mixed_forward(rows, x)
        self.check_not_merged()
        with parts_in_use(self.get_base_layer(), self.parts()):
            return call_with_hooks(self.base_layer, partial(self._look_up_rows, rows, known), x)

    def output_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor without values that is like the output for `x`."""
        return x.new_empty(*x.shape, self.out_features, dtype=self.stored.parameter.dtype)

    def _mixed_forward_in_graph(self, x: torch.Tensor) -> Any:
        if can_be_in_graph(x, self.parameters()):
            return in_graph(self.key_in_graph, x)
        return super()._mixed_forward_in_graph(x)

    def _needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.stored.parameter.requires_grad

    def _look_up_rows(self, rows: Rows, known: Set[str], x: torch.Tensor) -> torch.Tensor:
        check_not_traced()
        base = self.get_base_layer()
        sizes, _, order, back = rows.groups(len(x), known, math.inf, x.device)
        tokens = x if order is None else x[order]
        output = cast(torch.Tensor, type(base).forward(base, tokens))
        parts = zip(sizes, tokens.split([*sizes.values()]), output.split([*sizes.values()]), strict=True)
        for name, indices, vectors in parts:
            if name != BASE:
                vectors.view(-1)[self._off_of(name, indices.reshape(-1))] = 0
        return output if back is None else output[back]

    def _off_of(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Return where an adapter is off in the vectors of some tokens that stand one after another."""
        off, columns = self._zero_positions(adapter_name), self.mask_shape[1]
        begin, end = (torch.searchsorted(off, ((tokens + more) * columns).to(off.dtype)) for more in (0, 1))
        counts = end - begin
        place = torch.repeat_interleave(counts)
        chosen = torch.arange(len(place), device=off.device) + (begin - (counts.cumsum(0) - counts))[place]
        return off[chosen] + (place - tokens[place]) * columns

    def masked_rows(self, adapter_names: Sequence[str], rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of the table under the product of these adapters' masks.

        Args:
            adapter_names: the adapters.
            rows: int64, one dimension, ascending and distinct.

        Returns:
            (rows, dimensions) tensor; gradients reach the scores of these rows.
        """
        table = self.stored.values()[rows]
        for adapter_name in adapter_names:
            if adapter_name in self.peft_mask_scores:
                table = masked_weight(table, *self._scores_of_rows(adapter_name, rows))
            elif adapter_name in self.peft_mask_bits:
                table = apply_mask(table, self._mask_of_rows(adapter_name, rows))
        return table

    def _mask_of_rows(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        return unpack_bits(self.packed_mask(adapter_name)[rows], (len(rows), self.mask_shape[1]))

    def _scores_of_rows(
        self, adapter_name: str, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return scores, mask and positions as if these rows were all there is."""
        scores, mask, positions = self._scores_in_force(adapter_name)
        if positions is None and scores.shape[0] != self.mask_shape[0]:
            return scores, mask, None  # one for the whole table
        if positions is None:
            return scores[rows], None if mask is None else mask[rows], None
        # the candidates of a row stand together, from `first` on
        columns = self.mask_shape[1]
        first = torch.searchsorted(positions, (rows * columns).to(positions.dtype))
        counts = torch.searchsorted(positions, ((rows + 1) * columns).to(positions.dtype)) - first
        local_row = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        chosen = torch.arange(len(local_row), device=rows.device) + (first - (counts.cumsum(0) - counts))[local_row]
        local = positions[chosen] + (local_row - rows[local_row]) * columns
        return scores[chosen], None if mask is None else mask[chosen], local
