"""What a cache has done so far, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStatistics:
    """What an `AdapterCache` has done so far, and what it holds.

    Attributes:
        hits: adapters that were in a slot when a lease asked for them.
        misses: adapters that were not.
        loads: adapters read from their source.
        fills: adapters brought from memory into a slot.
        evictions: adapters that left memory for others, or by `evict`.
        refusals: leases, pins and refreshes that ended with an adapter refused.
        bytes: what adapters take in memory, heads included.
        adapters: how many these are.
        slots: how many of them are in the model.
        leases: how many leases are held, each counted for each of its adapters.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    fills: int = 0
    evictions: int = 0
    refusals: int = 0
    bytes: int = 0
    adapters: int = 0
    slots: int = 0
    leases: int = 0
