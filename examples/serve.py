"""Learn two tasks on one small model, then answer for both over HTTP, with a page for the browser.

    python -m examples.serve --output_dir served --port 8000

Tasks that are in the folder already are not learned again. Other arguments are those of `python -m peft_mask.server`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from examples.packaged import packaged_model
from peft_mask.server.__main__ import main as serve

DATA = Path(__file__).parent / "data"
TASKS = ("banking77", "clinc150")  # 77 intents of a bank's customers, 150 of an assistant's users


def learn(task: str, base: str, output: Path) -> None:
    """Learn one task with the script that anybody would use, in a process of its own."""
    said = {
        "model_name_or_path": base,
        "train_file": DATA / task / "train.csv",
        "test_file": DATA / task / "test.csv",
        "output_dir": output,
        "max_steps": 100,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": "none",
    }
    arguments = [word for name, value in said.items() for word in (f"--{name}", str(value))]
    if subprocess.run([sys.executable, "-m", "examples.text_classification", *arguments]).returncode:
        raise SystemExit(f"error: {task} was not learned; what is above says why.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("served"))
    said, others = parser.parse_known_args(argv)
    base = packaged_model()
    for task in TASKS:
        if not (said.output_dir / task / "adapter_model.safetensors").exists():
            learn(task, base, said.output_dir / task)
    serve(["--base", base, "--adapters", str(said.output_dir), *others])


if __name__ == "__main__":
    main()
