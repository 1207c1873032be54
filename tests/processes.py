"""Processes that train together on a CPU: how tests start them, and how those end."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds, many times what any of these takes on a slow machine


def launch(script: str, *arguments: str, processes: int = 2, kind: str = "ddp") -> str:
    """Run a script of this repository as a user does, with a configuration of the examples; what it prints."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"examples/accelerate/{kind}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if not kind.startswith("zero"):
        environment["ACCELERATE_USE_CPU"] = "true"
    started = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the launcher's processes wait for one another, and would for ever
        printed, errors = started.communicate()
        raise AssertionError(f"not done after {PATIENCE} seconds:\n{printed}\n{errors}") from None
    assert started.returncode == 0, errors  # all of it: the launcher's own words come last, and do not say why
    return printed


def leave() -> NoReturn:
    """End a process whose model is sharded over gloo, with all that it has done, but without the interpreter's end.

    A thread of gloo may still hold a tensor then, and drop it while the interpreter goes down: "terminate called
    without an active exception", signal 6 (pytorch/pytorch#179291). `destroy_process_group` ends the threads, but not
    while something refers to the group, as the device mesh of FSDP2 does for as long as the process lives (torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
