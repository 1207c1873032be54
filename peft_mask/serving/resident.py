"""Adapters in memory, least recently used first: who uses them, and which of them may go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from peft_mask.serving.coded import CodedAdapter


@dataclass(eq=False)
class Version:
    """One version of an adapter in memory.

    Attributes:
        name: of the adapter.
        coded: its bytes.
        leases: how many use it.
        slot: name of the slot that it is in, ready to be computed with; None if it is in memory alone.
        leaving: whether a lease that found no room waits for it to be free: nobody gets it before.
    """

    name: str
    coded: CodedAdapter
    leases: int = 0
    slot: str | None = None
    leaving: bool = False


@dataclass
class Resident:
    """Adapters in memory: versions in force by name, and old ones that are still leased.

    It knows nothing of threads: who uses it holds a lock.

    Attributes:
        bytes: what all of them take.
        pinned: names that stay.
    """

    bytes: int = 0
    pinned: set[str] = field(default_factory=set)
    _versions: OrderedDict[tuple[str, str], Version] = field(default_factory=OrderedDict)
    _in_force: dict[str, Version] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._versions)

    def __iter__(self) -> Iterator[Version]:
        """Go through all versions, the least recently used first."""
        return iter(list(self._versions.values()))

    def get(self, name: str) -> Version | None:
        """Return the version of an adapter that is in force, if there is any."""
        return self._in_force.get(name)

    def add(self, name: str, coded: CodedAdapter) -> Version:
        """Put a version in force: one that is here still, because it is leased, or a new one."""
        key = name, coded.digest
        if (version := self._versions.get(key)) is None:
            version = self._versions[key] = Version(name, coded)
            self.bytes += coded.nbytes
        self._in_force[name] = version
        return version

    def holds(self, name: str, coded: CodedAdapter) -> bool:
        """Return whether this version is here, in force or not."""
        return (name, coded.digest) in self._versions

    def remove(self, version: Version) -> None:
        """Forget a version."""
        del self._versions[version.name, version.coded.digest]
        if self._in_force.get(version.name) is version:
            del self._in_force[version.name]
        self.bytes -= version.coded.nbytes

    def use(self, version: Version) -> None:
        """Count one more who uses a version; it is the one most recently used now."""
        version.leases += 1
        self._versions.move_to_end((version.name, version.coded.digest))

    def is_old(self, version: Version) -> bool:
        """Return whether another version of its adapter is in force."""
        return self._in_force.get(version.name) is not version

    def may_go(self, spared: Collection[Version] = (), *, in_slots: bool = False) -> list[Version]:
        """Return those that are not pinned, the least recently used first, whether leased or not.

        Args:
            spared: who is not among them.
            in_slots: whether to leave out who is in no slot.
        """
        return [
            version
            for version in self._versions.values()
            if version.name not in self.pinned and version not in spared and (version.slot or not in_slots)
        ]
