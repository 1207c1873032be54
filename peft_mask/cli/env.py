"""`peft-mask env`: versions, platform and devices, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peft_mask.cli.answer import Answer, facts

_PACKAGES = (
    "peft-mask",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "huggingface_hub",
    "bitsandbytes",
    "scipy",
    "triton",
    "trl",
    "sentence-transformers",
    "datasets",
    "ray",
    "vllm",
)
_VARIABLES = ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # none of which is a secret


def add(commands: Any) -> None:
    """Add the command to a parser."""
    one = commands.add_parser(
        "env",
        help="versions, platform and devices, for bug reports",
        description="Print what a bug report needs: versions, platform, devices. No names, paths or secrets.",
        epilog="examples:\n  peft-mask env\n  peft-mask env --json",
    )
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> Answer:
    """Look around."""
    packages = {name: _version(name) for name in _PACKAGES}
    data = {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }
    text = facts(
        {name: found or "not installed" for name, found in packages.items()}
        | {
            "python": data["python"],
            "platform": f"{data['platform']}, {data['processor']}, {data['cpus']} CPUs",
            "devices": ", ".join(_devices()),
            "torch's CUDA": data["cuda"] or "none, a build for CPUs",
            "torch's threads": data["torch_threads"],
        }
        | {name: value for name, value in os.environ.items() if name in _VARIABLES}
    )
    return Answer(data, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cuda:{place} {torch.cuda.get_device_name(place)}" for place in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]
