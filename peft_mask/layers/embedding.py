"""Masked embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from peft_mask.format.packing import unpack_bits
from peft_mask.layers.mask_layer import MaskLayer
from peft_mask.scores.functional import apply_mask, masked_weight


class Embedding(MaskLayer):
    """A masked `nn.Embedding`. Only the rows looked up are masked, whatever the size of the table.

    The mask has the shape of the table, (embeddings, dimensions). As in the base layer, the row at `padding_idx` gets
    no gradient, and neither do its scores.
    """

    looks_for_zeros = False

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
