"""Room in memory and in the model: who gets it, who makes way for whom, and who waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft_mask.serving.coded import CodedAdapter
from peft_mask.serving.resident import Resident, Version
from peft_mask.serving.slots import Slots
from peft_mask.serving.turns import Turns


class Rooms:
    """Room for adapters in memory and in the slots of a model.

    `admit` and `fill` are for who has the turn. While they wait for room that is leased, the lock is free.

    Args:
        turns: whose lock is held around all that is counted.
        slots: those of the model.
        max_bytes: what adapters in memory may take.

    Attributes:
        resident: the adapters in memory.
        evictions: how many have left it for others.
        fills: how many have come into a slot.
    """

    def __init__(self, turns: Turns, slots: Slots, max_bytes: int) -> None:
        self.slots = slots
        self.max_bytes = max_bytes
        self.resident = Resident()
        self.evictions = 0
        self.fills = 0
        self._turns = turns
        self._lock = turns.lock
        self._empty = list(slots.names)

    def admit(self, name: str, coded: CodedAdapter, held: Sequence[Version], deadline: float) -> Version:
        """Put a version in force, once others have made room for it. The lock is held.

        Raises:
            NoRoomError: they had not by then.
            ValueError: there cannot be room for it beside those that are `held`.
        """
        needed = 0 if self.resident.holds(name, coded) else coded.nbytes

        def fits() -> bool:
            return self.resident.bytes + needed <= self.max_bytes

        while not fits():
            if (free := self._free(held)) is not None:
                self.evict(free)
                continue
            if sum(own.coded.nbytes for own in held) + needed > self.max_bytes:
                raise ValueError(f"the adapters of one lease take more than the {self.max_bytes:,} bytes of the cache.")
            self._ask_to_leave(self.resident.may_go(held))
            self._turns.wait_for(lambda: fits() or self._free(held) is not None, deadline, "memory is leased or pinned")
        old = self.resident.get(name)
        version = self.resident.add(name, coded)
        if old is not None and old is not version and not old.leases:
            self.drop(old)
        return version

    def release(self, versions: Sequence[Version]) -> None:
        """Count one less who uses each of these; an old version goes with the last."""
        with self._lock:
            for version in versions:
                version.leases -= 1
                if not version.leases and self.resident.is_old(version):
                    self.drop(version)
            self._lock.notify_all()

    # ---- from memory into a slot ----

    def fill(self, version: Version, held: Sequence[Version], deadline: float) -> None:
        """Bring a version that is held into a slot. Nobody can name the slot before it is full.

        Raises:
            NoRoomError: no slot was free by then.
        """
        with self._lock:
            slot = self._slot_for(held, deadline)
        try:
            self.slots.fill(slot, version.coded)
        except BaseException:
            with self._lock:
                self.slots.clear(slot)
                self._empty.append(slot)
            raise
        with self._lock:
            version.slot = slot
            self.fills += 1

    def _slot_for(self, held: Sequence[Version], deadline: float) -> str:
        while not self._empty:
            if not self.slots.is_full():
                return self.slots.new()
            if (free := self._free(held, in_slots=True)) is not None:
                self._leave_slot(free)
                break
            self._ask_to_leave(self.resident.may_go(held, in_slots=True))
            self._turns.wait_for(
                lambda: bool(self._empty) or self._free(held, in_slots=True) is not None,
                deadline,
                "all slots are leased or pinned",
            )
        return self._empty.pop()

    # ---- who may go ----

    def _free(self, held: Sequence[Version], *, in_slots: bool = False) -> Version | None:
        """Return who may go at once, the least recently used one."""
        return next((own for own in self.resident.may_go(held, in_slots=in_slots) if not own.leases), None)

    @staticmethod
    def _ask_to_leave(leased: Sequence[Version]) -> None:
        for version in leased[:1]:
            version.leaving = True  # else those who lease it in turn would keep it for ever

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let those who were asked to leave be leased again at the end, if they are still there."""
        try:
            yield
        finally:
            with self._lock:
                for version in self.resident:
                    version.leaving = False

    def evict(self, version: Version) -> None:
        """Let a version go that nobody uses."""
        self.drop(version)
        self.evictions += 1

    def drop(self, version: Version) -> None:
        """Take a version out of memory and of its slot, uncounted: another one takes its place."""
        self._leave_slot(version)
        self.resident.remove(version)

    def _leave_slot(self, version: Version) -> None:
        if version.slot is not None:
            self.slots.clear(version.slot)
            self._empty.append(version.slot)
            version.slot = None
