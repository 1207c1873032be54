"""How scripts end that were launched as several processes: at once, with all they printed and their status."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.processes import ROOT

# what a case is called -> the last lines of its script's `main`, and how many processes it was launched as
TRAINER = "trainer = type('Trainer', (), {'__del__': lambda self: print('freed', end='')})()"
CASES = {
    "done": ("", 2),
    "an error": ("raise ValueError('lost')", 2),
    "exit 2": ("raise SystemExit(2)", 2),
    "exit": ("raise SystemExit()", 2),
    "freed": (TRAINER, 2),
    "kept": (f"{TRAINER}; launched.keep(trainer)", 2),
    "alone": ("", 1),
}

# The imports are what takes long: one process has them, and each case is a fork of it, which ends as a script does.
SCRIPT = """
import atexit, json, os, sys
from peft_mask.recipes import launched

cases = json.loads(sys.argv[1])
ended = {}
for name, (lines, processes) in cases.items():
    if (child := os.fork()) == 0:
        break
    ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
else:
    print(json.dumps(ended))
    sys.exit()

sys.stdout, sys.stderr = open(f"{name}.out", "w"), open(f"{name}.err", "w")
os.environ["WORLD_SIZE"] = str(processes)
atexit.register(lambda: print("Python's own end"))

def main():
    print("done", end="")
    exec(lines)

launched.run(main)
"""


class Ended(NamedTuple):
    status: int
    printed: str
    errors: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How each case ended."""
    folder = tmp_path_factory.mktemp("launched")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return {
        name: Ended(status, (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text())
        for name, status in json.loads(ran.stdout).items()
    }


@pytest.mark.parametrize(
    ("case", "status", "said"),
    [("done", 0, ""), ("an error", 1, "ValueError: lost"), ("exit 2", 2, ""), ("exit", 0, "")],
)
def test_each_of_several_processes_leaves_with_its_status(ended, case, status, said):
    assert ended[case][:2] == (status, "done")
    assert said in ended[case].errors


@pytest.mark.parametrize(("case", "printed"), [("freed", "donefreed"), ("kept", "done")])
def test_what_is_kept_is_not_freed_before_the_process_is_left(ended, case, printed):
    assert ended[case].printed == printed


def test_a_single_process_ends_as_python_does(ended):
    assert ended["alone"].printed == "donePython's own end\n"
