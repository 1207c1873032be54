"""Whose the tokens of a vLLM batch are: from its LoRA mapping, once a call, on the host."""

from __future__ import annotations

from collections.abc import Sequence

from peft_mask.layers.rows import BASE, Rows


def slot_name(slot: int) -> str:
    """Return what the adapter in a slot is called among rows."""
    return f"slot {slot}"


class Tokens:
    """The owners of the tokens of one batch.

    Args:
        adapters: (tokens,) an adapter's id for each token; 0 for none.
        slots: which id is in which slot; None for an empty one.
    """

    def __init__(self, adapters: Sequence[int], slots: Sequence[int | None]) -> None:
        names = {adapter: slot_name(slot) for slot, adapter in enumerate(slots) if adapter is not None}
        self._names = [names.get(adapter, BASE) for adapter in adapters]
        self.owners = frozenset(self._names)
        self._rows: dict[int, Rows] = {}

    def rows(self, count: int) -> Rows:
        """Return the owners of `count` tokens: those of the mapping, and none for what a batch is padded with."""
        if count not in self._rows:
            self._rows[count] = Rows([*self._names, *[BASE] * (count - len(self._names))][:count])
        return self._rows[count]
