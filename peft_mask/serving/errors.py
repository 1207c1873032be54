"""Why an adapter cannot be had: it is refused, unknown, or there is no room for it now."""

from __future__ import annotations


class AdapterRefusedError(ValueError):
    """An adapter cannot be used: it is damaged, of another base or task, or not to be read.

    Nothing of it is in the model or in memory. It is not tried again for some seconds (`refusal_seconds`).

    Attributes:
        name: which adapter.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the adapter {name!r} is refused: {reason}")
        self.name = name
        self.reason = reason


class UnknownAdapterError(AdapterRefusedError, LookupError):
    """There is no adapter of this name, or the name cannot be one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.args = (f"there is no adapter {name!r}: {reason}",)


class NoRoomError(TimeoutError):
    """Others held the slots or the memory for longer than this lease would wait."""
