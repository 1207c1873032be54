"""What can be wrong on a GPU, found without one: scenarios on a simulated device, under CUDA's rules.

One process runs them all (`tests/simulated_device/run.py`), since it gives torch another kind of device for good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.simulated_device import build
from tests.simulated_device.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
SLOW = {"quantized_nf4", "quantized_fp4"}  # bitsandbytes' own 4-bit kernels for no device in particular take seconds

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "it can be built")

# case -> phase -> how many waits of ours: none in the passes of a step, one in the optimizer's for all matrices at once
STEP = {"forward": 0, "backward": 0, "step": 1}
WAITS = {
    "topk": STEP,
    "topk of a decoder": STEP,
    "topk of Conv1D": STEP,
    "topk with biases": STEP,
    "rows": STEP,
    "bfloat16 scores": STEP,
    "threshold": STEP,
    "bernoulli": STEP,
    "n:m": STEP,
    "embedding": {"forward": 2, "backward": 0, "step": 1},  # how many rows are looked up, and candidates in them
    "checkpointed": STEP,
    "resumed, bfloat16 scores": STEP,
    "serving": {
        "the first unmerged": 2,
        "unmerged": 0,
        "the first mixed": 2,
        "mixed": 0,
        "a later switch": 0,
        "merged": 0,
    },
    "a log of two matrices": {"log": 8},  # NaN, positions, zeros and flips of each
}


def report(tmp_path_factory, title, names):
    """What the process reports; under pytest-xdist the first worker to ask runs it, for all of them."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.getbasetemp()
    file = folder / f"simulated-device-{title}.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            command = [sys.executable, "-m", "tests.simulated_device.run", str(file), *names]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return report(tmp_path_factory, "fast", sorted(SCENARIOS.keys() - SLOW))


def check(result):
    assert "cpu" not in result["errors"], result["errors"]["cpu"]
    assert "simgpu" not in result["errors"], result["errors"]["simgpu"]
    assert result["same"], "other results than on the CPU"


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - SLOW))
def test_a_device_computes_what_the_cpu_does_and_meets_no_other(fast, name):
    check(fast["scenarios"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_four_bits_meet_no_other_device(tmp_path_factory, name):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check(report(tmp_path_factory, "slow", sorted(SLOW))["scenarios"][name])


@pytest.mark.parametrize("case", WAITS)
def test_the_host_waits_for_the_device_so_often_and_no_more(fast, case):
    ours = {phase: [w for w in waits if "| peft_mask/" in w] for phase, waits in fast["waits"][case].items()}
    assert {phase: len(waits) for phase, waits in ours.items()} == WAITS[case], ours


def test_every_case_is_counted(fast):
    assert fast["waits"].keys() == WAITS.keys()


def test_a_backward_pass_holds_one_matrix_at_a_time(fast):
    weight, peak = fast["peak"]["weight"], fast["peak"]["peak"]
    assert weight <= peak < 1.5 * weight  # W * M, then the gradient's product in its place


def test_the_device_raises_and_reports_as_cuda_does(fast):
    rules = fast["rules"]
    assert "found at least two devices" in rules["two devices"]
    assert "found at least two devices" in rules["the cpu's"]
    assert "Expected a 'simgpu' device type for generator" in rules["a generator of the cpu"]
    assert "simgpu" in rules["numpy"]
    for read in ("a number", "a mask", "a list", "a table", "to the host"):
        assert rules[read] >= 1, read
    for free in ("a scalar", "a fill under a mask", "an index"):
        assert rules[free] == 0, free
