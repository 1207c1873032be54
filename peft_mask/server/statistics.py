"""What a batcher has computed so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """What a `Batcher` has computed so far.

    Attributes:
        rows: inputs that were answered.
        batches: calls of the model that answered them.
        adapters: the adapters of each of these calls, summed: above `batches` where batches are mixed.
        tokens: those of the inputs, without padding.
        failures: calls of the model that failed; the rows of a batch are tried again in halves.
        most_adapters: of one call.
    """

    rows: int = 0
    batches: int = 0
    adapters: int = 0
    tokens: int = 0
    failures: int = 0
    most_adapters: int = 0

    def count(self, rows: int, adapters: int, tokens: int) -> None:
        """Add one call of the model."""
        self.rows += rows
        self.batches += 1
        self.adapters += adapters
        self.tokens += tokens
        self.most_adapters = max(self.most_adapters, adapters)
