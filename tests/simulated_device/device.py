"""Registers the device "simgpu" in this process, for good, and says where its host would have to wait.

Import it before anything that asks which devices there are. A process in which other tests run is the wrong place.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.simulated_device.build import built

NAME = "simgpu"
PACKAGE = Path(__file__).parents[2] / "peft_mask"


def _load() -> types.ModuleType:
    (file,) = built().glob("simulated_device*.so")
    specification = importlib.util.spec_from_file_location("simulated_device", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


_C = _load()


def _index(device: object) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


class _Device:
    """What `torch.cuda.device` is for CUDA."""

    def __init__(self, device: object) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = _C.current_device()
        _C.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        _C.set_device(self.before)


def _seed_all(seed: int) -> None:
    for index in range(_C.devices):
        _C.seed(index, seed)


def _module() -> types.ModuleType:
    """What `torch.cuda` is for CUDA: as much of it as torch, transformers and accelerate ask for."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.device = _Device
    module.device_count = lambda: _C.devices
    module.current_device = _C.current_device
    module.set_device = lambda device: _C.set_device(_index(device))
    module.synchronize = lambda *_: None
    module.empty_cache = lambda: None
    module.manual_seed = lambda seed: _C.seed(_C.current_device(), seed)
    module.manual_seed_all = _seed_all
    module.get_rng_state = lambda device=NAME: _C.get_rng_state(_index(device))
    module.set_rng_state = lambda state, device=NAME: _C.set_rng_state(_index(device), state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_bf16_supported = lambda *_: True
    return module


torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())
torch.utils.generate_methods_for_privateuse1_backend()


def held() -> int:
    """Bytes that are held on the devices."""
    return _C.reset_peak()


def peak_of(call: object) -> int:
    """The most bytes that a call holds on the devices beyond what was held before."""
    before = _C.reset_peak()
    call()
    return _C.peak() - before


# ---- waits ----

_logs: list[list[str]] = []


def _log(what: str) -> None:
    if _logs:
        _logs[-1].append(f"{what} | {_place()}")


def _place() -> str:
    """The innermost line of peft_mask that is being run; if there is none, the line that asked."""
    asked = frame = sys._getframe(2)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame = frame.f_back
    place, frame = Path((frame or asked).f_code.co_filename), frame or asked
    ours = place.is_relative_to(PACKAGE)
    shown = place.relative_to(PACKAGE.parent) if ours else Path(*place.parts[-2:])
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"


_C.report_waits_to(_log)


@contextmanager
def waits() -> Iterator[list[str]]:
    """The list of what the host waits for meanwhile: operation, file, line, function."""
    _logs.append([])
    try:
        yield _logs[-1]
    finally:
        _logs.pop()
