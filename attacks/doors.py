"""The doors an adapter comes in by, and what is checked of each attempt."""

from __future__ import annotations

import copy
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from attacks.victim import base_model, base_tensors, logits, quiet
from peft_mask import Masks, hotswap_adapter

NEW = "new"  # the name that hostile adapters are given beside a good one


@dataclass(frozen=True)
class Door:
    """A way in.

    Attributes:
        name: what users call.
        victim: makes the model before the attack, of a good adapter's folder.
        enter: loads the adapter in a folder into the victim.
        recover: brings the victim, which has met the adapter, to compute what the good adapter computes.
    """

    name: str
    victim: Callable[[Path], Any]
    enter: Callable[[Any, Path], Any]
    recover: Callable[[Any, Path], Any]


def _with_good_adapter(good: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_model(), good).eval()


def _with_good_adapter_by_transformers(good: Path) -> nn.Module:
    model: Any = base_model()
    model.load_adapter(good)
    return model


def _without_the_new(model: Any, good: Path) -> Any:
    if NEW in model.peft_config:
        model.delete_adapter(NEW)
    return model


def _without_the_new_by_transformers(model: Any, good: Path) -> Any:
    model.set_adapter("default")  # which transformers has put out of use by then, and the trained head for good
    return _without_the_new(model, good)


def _once_more(model: Any, good: Path) -> Any:
    return PeftModel.from_pretrained(model, good).eval()


def _as_it_is(model: Any, good: Path) -> Any:
    return model


DOORS = {
    door.name: door
    for door in (
        Door("PeftModel.from_pretrained", lambda _: base_model(), PeftModel.from_pretrained, _once_more),
        Door(
            "PeftModel.load_adapter",
            _with_good_adapter,
            lambda model, folder: model.load_adapter(folder, NEW),
            _without_the_new,
        ),
        Door(
            "transformers' load_adapter",
            _with_good_adapter_by_transformers,
            lambda model, folder: model.load_adapter(folder, adapter_name=NEW),
            _without_the_new_by_transformers,
        ),
        Door(
            "hotswap_adapter",
            _with_good_adapter,
            lambda model, folder: hotswap_adapter(model, str(folder), "default"),
            _as_it_is,
        ),
        Door("Masks.load", _with_good_adapter, lambda _, folder: Masks.load(folder), _as_it_is),
    )
}
PEFT, SECOND, NATIVE, HOTSWAP, MASKS = DOORS

# What a user can catch and understand. Everything else is a defect, unless the table names it with its reason.
CLEAR = (ValueError, OSError, SafetensorError, UnpicklingError)


@dataclass
class Outcome:
    """What became of one attempt.

    Attributes:
        error: how the adapter was refused; None if it was loaded.
        peak: most bytes taken at a time, beyond those before.
        problems: what should not be, in words; none if all is well.
    """

    error: BaseException | None
    peak: int
    problems: list[str] = field(default_factory=list)


class Attacker:
    """Sends adapters through doors, and looks at what is left.

    Args:
        good: folder of a good adapter.
    """

    def __init__(self, good: Path) -> None:
        self.good = good
        with quiet():
            self.expected = logits(_with_good_adapter(good))
            self._victims = {name: door.victim(good) for name, door in DOORS.items()}

    def attack(self, door: Door, folder: Path) -> Outcome:
        """Load the adapter in `folder` by a door, into a model of its own."""
        victim = copy.deepcopy(self._victims[door.name])
        before, files = base_tensors(victim), _files_beside(folder)
        error: BaseException | None = None
        with quiet(), Peak() as peak:
            try:
                door.enter(victim, folder)
            except Exception as caught:
                error = caught
        outcome = Outcome(error, peak.bytes)
        after = base_tensors(victim)
        if changed := [name for name in before if not _same_bytes(before[name], after.get(name))]:
            outcome.problems.append(f"changed the base weights {changed[:3]}")
        if (left := _files_beside(folder)) != files:
            outcome.problems.append(f"left files behind: {sorted(map(str, left - files))}")
        if error is not None:
            outcome.problems += self._what_is_broken(door, victim)
        return outcome

    def _what_is_broken(self, door: Door, victim: Any) -> list[str]:
        try:
            with quiet():
                if not torch.equal(logits(door.recover(victim, self.good)), self.expected):
                    return ["the good adapter computes something else now"]
        except Exception as error:
            return [f"the model does not go on: {describe(error)}"]
        return []


def is_clear(error: BaseException) -> bool:
    """Whether an exception is one that a user can catch and understand."""
    ours = describe(error).startswith("AttributeError of peft_mask")  # to transformers, which asks for an attribute
    return isinstance(error, CLEAR) or ours


def describe(error: BaseException) -> str:
    """One line on an exception: type, the project that raised it, beginning of the message."""
    trace = error.__traceback__
    raised_in = ""
    while trace is not None:
        raised_in, trace = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0], trace.tb_next
    return f"{type(error).__name__} of {raised_in}: {' '.join(str(error).split())[:160]}"


class Peak:
    """Measures the most memory taken at a time inside a block, in `bytes`.

    The kernel's own peak of the process where it can be reset (Linux), so that tensors count; else what Python and
    numpy take.
    """

    def __enter__(self) -> Peak:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before: int | None = _resident("VmRSS")
        except OSError:
            self._before = None
            tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = max(0, _resident("VmHWM") - self._before)
        else:
            self.bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()


def _resident(field_name: str) -> int:
    found = re.search(rf"{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _same_bytes(left: torch.Tensor, right: torch.Tensor | None) -> bool:
    return (
        right is not None
        and (left.dtype, left.shape) == (right.dtype, right.shape)
        and left.numpy().tobytes() == right.numpy().tobytes()
    )


def _files_beside(folder: Path) -> set[Path]:
    """Every file around the adapter, where the caller has put the directory for temporary files as well."""
    return set(folder.parent.rglob("*"))
