"""What is done on the simulated device as on the CPU: `SCENARIOS[name](device, folder)` returns what must be the same.

@scenario
def merging(device, folder): ...
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Scenario = Callable[[str, Path], Any]

SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


from tests.simulated_device.scenarios import analysis, files, quantized, serving, training  # noqa: E402,F401
