"""Builds the simulated device, once for each version of its source, of torch and of Python, into a folder for that."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "cpp"


def missing() -> str:
    """What this machine lacks to build it; empty if nothing."""
    if sys.platform != "linux":
        return f"the simulated device is built on Linux, this is {sys.platform}"
    if _compiler() is None:
        return "no C++ compiler (looked for $CXX, c++, g++, clang++), which the simulated device is built with"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h (a package such as python3-dev has it), which the simulated device is built with"
    return ""


def built() -> Path:
    """The folder of the module `simulated_device`."""
    sources = sorted(SOURCE.iterdir())
    said = [torch.__version__, sys.version, *(path.read_text() for path in sources)]
    folder = _cache() / hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]
    module = folder / f"simulated_device{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.is_file():
        return folder
    folder.mkdir(exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as half:  # so that no one meets half a module
        command = [
            *(str(_compiler()), "-shared", "-fPIC", "-std=c++20", "-O1", "-w"),
            *("-isystem", str(torch_folder / "include"), "-isystem", sysconfig.get_path("include")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(str(SOURCE / "simulated_device.cpp"), "-o", f"{half}/module"),
            *(f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the simulated device does not compile: {' '.join(command)}\n{done.stderr}")
        os.replace(f"{half}/module", module)
    return folder


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def _cache() -> Path:
    """A folder that outlasts a checkout, and that no one else can have put a module into."""
    folder = Path(tempfile.gettempdir(), f"peft-mask-simulated-device-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise RuntimeError(f"'{folder}' is not this user's own folder: remove it.")
    return folder
