"""How scripts end that were launched as several processes: at once, with all they printed and their status."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

SCRIPT = """
import atexit
from peft_mask.recipes import launched

atexit.register(lambda: print("Python's own end"))

def main():
    print("done", end="")
    {}

launched.run(main)
"""


def ended(line, processes):
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", SCRIPT.format(line)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("", 0, ""),
        ("raise ValueError('lost')", 1, "ValueError: lost"),
        ("raise SystemExit(2)", 2, ""),
        ("raise SystemExit()", 0, ""),
    ],
)
def test_each_of_several_processes_leaves_with_its_status(line, status, said):
    done = ended(line, 2)
    assert (done.returncode, done.stdout) == (status, "done")
    assert said in done.stderr


@pytest.mark.parametrize(("line", "printed"), [("", "donefreed"), ("launched.keep(trainer)", "done")])
def test_what_is_kept_is_not_freed_before_the_process_is_left(line, printed):
    trainer = "trainer = type('Trainer', (), {'__del__': lambda self: print('freed', end='')})()"
    assert ended(f"{trainer}\n    {line}", 2).stdout == printed


def test_a_single_process_ends_as_python_does():
    assert ended("", 1).stdout == "donePython's own end\n"
