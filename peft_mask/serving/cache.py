"""`AdapterCache`: hundreds of adapters of one base model, of which those in use are in the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel

from peft_mask.layers.rows import BASE
from peft_mask.serving.coded import CodedAdapter, read_adapter
from peft_mask.serving.errors import AdapterRefusedError
from peft_mask.serving.flights import Flight, Flights
from peft_mask.serving.lease import Grant, Lease, Rows
from peft_mask.serving.loads import Loads
from peft_mask.serving.resident import Version
from peft_mask.serving.rooms import Rooms
from peft_mask.serving.sizes import bytes_of
from peft_mask.serving.slots import Slots
from peft_mask.serving.source import Source, check_name, locator, names_of
from peft_mask.serving.statistics import CacheStatistics
from peft_mask.serving.turns import Turns

_WAITING_TASKS = 4  # threads that wait for tasks of asyncio; those that wait longest do so in one queue anyway


class AdapterCache:
    """Adapters of one base model: all of them at a source, many coded in memory, those in use in slots of the model.

        with cache.lease(["de", "fr", "de"]) as rows:
            model(**inputs, adapter_names=rows)

    From the source an adapter comes into memory as the bytes of its file, a twentieth of a bit a weight, and from there
    into a slot, whose name is what `adapter_names` takes. Whoever leases it has one version of it for as long as the
    lease lasts, in all layers and in the head. What nobody leases, and nobody has pinned, makes room for others, the
    least recently used first, and only once what needs the room was read and found right.

    Adapters may have fewer labels than the model. Their logits come first, and `rows.adapters` says of each row how
    many these are and, if `labels.json` stands in the adapter's folder, what they are called. The logits after them
    are the most negative finite number, so that softmax gives them 0; where the head has no bias they are 0.

    All methods may be called from any thread, and calls of the model under a lease need no lock, whatever is loaded
    or evicted meanwhile.

    Args:
        model: a PEFT model with one adapter active. That one is not the cache's; the others may mask no layer that it
            does not, train beside their masks what it does, and have no more labels.
        source: a folder of adapters' folders; a mapping from name to folder or to an id on the Hub, with its
            `@revision` or without; or a callable that returns one of these for a name, and raises a `LookupError` for
            a name that it does not know.
        max_bytes: what adapters in memory may take, heads included, as a number or as "2GB". While one is read it is
            held beside the others.
        slots: how many adapters may be in use at a time.
        timeout: how many seconds a lease waits for room that others have, unless it says so itself.
        refusal_seconds: for how long a refused adapter is not tried again.

    Raises:
        TypeError: `model` is not a PEFT model, or `source` none of the three.
        ValueError: the model has a cache already, no mask active or one merged; or a number has no meaning.
    """

    def __init__(
        self,
        model: PeftModel,
        source: Source,
        max_bytes: int | str = "2GB",
        slots: int = 64,
        timeout: float = 30.0,
        refusal_seconds: float = 10.0,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be 1 at least, got {slots}.")
        self.model = model
        self.source = source
        self.max_bytes = bytes_of(max_bytes)
        self.timeout = timeout
        self._flights = Flights(refusal_seconds)
        self._turns = Turns()
        self._lock = self._turns.lock
        self._loads = Loads(self._turns, self._flights, locator(source))
        self._counts = CacheStatistics()
        self._executor: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._rooms = Rooms(self._turns, Slots(model, slots), self.max_bytes)
        self._resident = self._rooms.resident

    # ---- what users ask for ----

    def lease(self, names: Sequence[str], timeout: float | None = None) -> Lease:
        """Return a context in which adapters are in the model: what is missing is loaded, once for all who wait.

        It is entered by `with`, or by `async with`, which lets other tasks run while it waits. Lease what a call needs
        in one go: who holds a lease while waiting for another may wait for itself.

        Args:
            names: an adapter's name for each row of the batch, or `"__base__"` for none.
            timeout: how many seconds to wait for room that others have; by default the cache's.

        Returns:
            A context that gives the value of `adapter_names`, a list that also says which adapters these are (see
            `lease.Rows`). Entering it may raise

            - `AdapterRefusedError` for an adapter that is damaged or not for this model, `UnknownAdapterError` for one
              that is not there: no other adapter of the lease is leased then;
            - `NoRoomError`, a `TimeoutError`, if there was no room in time;
            - `ValueError` for more adapters than there can be room for.

        Raises:
            TypeError: `names` is not a list of strings.
        """
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"lease takes a list with a name for each row, got {names!r}.")
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        rows = list(names)
        return Lease(partial(self._at_once, rows), partial(self._wait, rows, deadline), self._give_back, self._threads)

    def pin(self, name: str) -> None:
        """Bring an adapter into a slot, and keep it there.

        Raises:
            ValueError: no room would be left for it beside the others that are pinned, or as for `lease`.
            NoRoomError: as for `lease`.
        """
        with self.lease([name]), self._lock:
            version = self._resident.get(name)
            pinned = [own for own in map(self._resident.get, self._resident.pinned | {name}) if own is not None]
            if len(pinned) > self._rooms.slots.count or sum(own.coded.nbytes for own in pinned) > self.max_bytes:
                raise ValueError(
                    f"cannot pin {name!r} beside the {len(pinned) - 1} adapters that are: no room is left."
                )
            if version is not None:
                self._resident.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter go again when others need its room."""
        with self._lock:
            self._resident.pinned.discard(name)
            self._lock.notify_all()

    def refresh(self, name: str) -> bool:
        """Read an adapter anew, and let leases from now on have the new version; who has the old one keeps it.

        If the new one is refused, the old one stays in force. Of an adapter that is not in memory it is forgotten that
        it was refused, so that the next lease tries again.

        Returns:
            Whether there was another version.

        Raises:
            AdapterRefusedError: the new version cannot be used.
            NoRoomError: there was no room for both in time.
        """
        deadline = time.monotonic() + self.timeout
        with self._lock:
            self._check_open()
            self._flights.forget(check_name(name))
            if self._resident.get(name) is None and not self._flights.look_anew(name):
                return False
        with self._counting_refusals():
            folder = self._loads.find(name)
            with self._turns.turn(deadline):
                self._check_open()
                if (
                    self._resident.get(name) is None
                ):  # who still loads it comes after this turn, and reads it as it is now
                    return False
                coded = self._read(name, folder)
                with self._lock, self._rooms.asking():
                    old = self._resident.get(name)
                    if old is not None and old.coded.digest == coded.digest:
                        return False
                    if old is not None and not old.leases:
                        self._rooms.drop(old)
                    self._rooms.admit(name, coded, (), deadline)
                    return True

    def evict(self, name: str) -> bool:
        """Take an adapter out of memory and out of the model.

        Returns:
            Whether it was there.

        Raises:
            ValueError: it is leased or pinned.
        """
        with self._lock:
            version = self._resident.get(name)
            if version is None:
                return False
            if version.leases or name in self._resident.pinned:
                why = f"leased {version.leases} times" if version.leases else "pinned: call unpin first"
                raise ValueError(f"cannot evict {name!r}: it is {why}.")
            self._rooms.evict(version)
            return True

    def names(self) -> list[str]:
        """Return the names that the source has now, sorted, whether or not these adapters can be used.

        Raises:
            TypeError: the source is a callable, which does not tell.
        """
        return names_of(self.source)

    def stats(self) -> CacheStatistics:
        """Return what the cache has done so far, and what it holds."""
        with self._lock:
            versions = list(self._resident)
            return replace(
                self._counts,
                fills=self._rooms.fills,
                evictions=self._rooms.evictions,
                bytes=self._resident.bytes,
                adapters=len(versions),
                slots=sum(version.slot is not None for version in versions),
                leases=sum(version.leases for version in versions),
            )

    def close(self) -> None:
        """Take everything out of the model that the cache has put there.

        Raises:
            ValueError: adapters are leased.
            NoRoomError: others were bringing adapters in for as long as a lease would wait.
        """
        with self._turns.turn(time.monotonic() + self.timeout), self._lock:
            if leased := sorted({version.name for version in self._resident if version.leases}):
                raise ValueError(f"cannot close the cache: {leased[:5]} are leased.")
            if not self._is_closed:
                self._is_closed = True
                for version in self._resident:
                    self._rooms.drop(version)
                self._rooms.slots.close()
                self._lock.notify_all()
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    # ---- leases ----

    def _at_once(self, rows: Sequence[str]) -> Grant | None:
        """Lease adapters that are in slots already; None if one is not."""
        with self._counting_refusals(), self._lock:
            self._check_open()
            wanted = self._wanted(rows)
            versions = [self._resident.get(name) for name in wanted]
            ready = [own for own in versions if own is not None and own.slot is not None and not own.leaving]
            self._count(hits=len(ready), misses=len(wanted) - len(ready))
            return self._granted(rows, ready) if len(ready) == len(wanted) else None

    def _wait(self, rows: Sequence[str], deadline: float) -> Grant:
        """Bring adapters into slots, and lease them."""
        held: list[Version] = []
        with self._counting_refusals(), ExitStack() as stack:
            with self._lock:
                wanted = self._wanted(rows)
                flights = {name: self._loads.join(name, stack) for name in wanted if self._resident.get(name) is None}
            for name, (flight, first) in flights.items():
                self._loads.find_together(name, flight, first, deadline)
            waiting = [flight for flight, _ in flights.values()]
            with self._turns.turn(deadline, lambda: any(flight.error is not None for flight in waiting)):
                self._loads.raise_if_refused(waiting)
                self._check_open()  # it may have been closed while this one waited
                try:
                    with self._rooms.asking():
                        with self._lock:  # those that are here first: else they might make way for the others
                            wanted.sort(key=lambda name: self._resident.get(name) is None)
                        for name in wanted:
                            self._hold(name, flights[name][0] if name in flights else None, held, deadline)
                        for version in held:
                            if version.slot is None:
                                self._rooms.fill(version, held, deadline)
                    return Grant(Rows.of(rows, held), held)
                except BaseException:
                    self._rooms.release(held)
                    raise

    def _wanted(self, rows: Sequence[str]) -> list[str]:
        self._check_open()
        wanted = list(dict.fromkeys(check_name(name) for name in rows if name != BASE))
        pinned = len(self._resident.pinned - set(wanted))
        if len(wanted) + pinned > self._rooms.slots.count:
            beside = f", of which {pinned} are pinned" if pinned else ""
            raise ValueError(
                f"a lease of {len(wanted)} adapters cannot be had with {self._rooms.slots.count} slots{beside}."
            )
        return wanted

    def _granted(self, rows: Sequence[str], versions: Sequence[Version]) -> Grant:
        for version in versions:
            self._resident.use(version)
        return Grant(Rows.of(rows, versions), list(versions))

    def _give_back(self, grant: Grant) -> None:
        self._rooms.release(grant.versions)

    # ---- from the source into memory ----

    def _read(self, name: str, folder: Path) -> CodedAdapter:
        with self._loads.refusing(name):
            coded = self._rooms.slots.check(read_adapter(folder, self.max_bytes))
        self._count(loads=1)
        return coded

    def _hold(self, name: str, flight: Flight | None, held: list[Version], deadline: float) -> None:
        """Lease an adapter that may be in no slot yet, and add it to those that are `held`."""
        with self._lock:
            if (version := self._resident.get(name)) is not None:
                self._resident.use(version)
                held.append(version)
                return
        folder = flight.folder if flight is not None else None
        coded = self._read(name, self._loads.find(name) if folder is None else folder)
        with self._lock:
            version = self._rooms.admit(name, coded, held, deadline)
            self._resident.use(version)
            held.append(version)

    # ---- what goes wrong, and is counted ----

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except AdapterRefusedError:
            self._count(refusals=1)
            raise

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counts = replace(self._counts, **{key: getattr(self._counts, key) + n for key, n in more.items()})

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the cache is closed.")

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_WAITING_TASKS, thread_name_prefix="peft-mask-cache")
            return self._executor
