"""Masks in PEFT's own comparison on MetaMathQA and GSM8K, run by PEFT's own scripts; docs/gpu-runs.md says what for.

python -m benchmarks.metamath PEFT          # every row, each in a process of its own
python -m benchmarks.metamath PEFT ROW

PEFT is a checkout of github.com/huggingface/peft, installed by `pip install -e PEFT`. A GPU is needed, and access to
meta-llama/Llama-3.2-3B on the Hub.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import peft
import torch

from peft_mask import SignAdamW, SparsitySchedule, create_mask_optimizer, spend_budget

HERE = Path(__file__).parent
ROWS = sorted(folder.name for folder in (HERE / "experiments" / "mask").iterdir())
OPTIMIZER = "SignAdamW"  # the `optimizer_type` of our rows


def mask_optimizer(model: Any, steps: int, **options: Any) -> torch.optim.Optimizer:
    """Make sign steps that let the budget grow as `MaskCallback()` does; the harness's loop takes no callback."""
    optimizer = create_mask_optimizer(model, **options)
    schedule = SparsitySchedule.gentle(model.active_peft_config.target_sparsity, steps)
    taken = count(1)
    spend_budget(model, schedule.share(0.0))
    optimizer.register_step_post_hook(lambda *_: spend_budget(model, schedule.share(next(taken) / steps)))
    return optimizer


def add_optimizer(utils: Any) -> None:
    """Add the optimizer of masks to the harness, which has branches for those of LoRA+ and LoRA-FA.

    Any other name is one of `torch.optim`, made of all parameters. Ours needs the model as well, so the name stands
    there for what is made of the model at hand; the learning rate's schedule is the harness's.
    """
    make = utils.get_optimizer_and_scheduler
    setattr(torch.optim, OPTIMIZER, SignAdamW)  # the settings of a row are checked before there is a model

    def make_for_masks(model: Any, *, max_steps: int, **options: Any) -> Any:
        setattr(torch.optim, OPTIMIZER, lambda _, **kwargs: mask_optimizer(model, max_steps, **kwargs))
        return make(model, max_steps=max_steps, **options)

    utils.get_optimizer_and_scheduler = make_for_masks


def run(harness: Path, row: str, where: Path = HERE) -> None:
    """Run the harness's `run.py` on a row in `where`/experiments/mask, as `python run.py -v` would."""
    sys.path.insert(0, str(harness))
    add_optimizer(importlib.import_module("utils"))
    os.chdir(where)  # it takes paths of the form experiments/<method>/<name> alone
    sys.argv = ["run.py", "-v", f"experiments/mask/{row}"]
    runpy.run_path(str(harness / "run.py"), run_name="__main__")


def checked(checkout: Path) -> Path:
    """Return the harness's folder in a checkout of PEFT.

    Raises:
        ValueError: if it is not there, or would file its results wrongly.
    """
    harness = checkout.resolve() / "method_comparison" / "MetaMathQA"
    if not (harness / "run.py").is_file():
        raise ValueError(
            f"{checkout} has no method_comparison/MetaMathQA/run.py: give a checkout of github.com/huggingface/peft. "
            "The package on PyPI does not contain the comparison."
        )
    if not Path(str(peft.__file__)).resolve().is_relative_to(checkout.resolve()):
        raise ValueError(
            f"PEFT is imported from {Path(str(peft.__file__)).parent}, not from {checkout}, and the harness asks git "
            f"there which branch a result is of: pip install -e {checkout}"
        )
    if sys.version_info < (3, 12):
        raise ValueError(
            f"the harness needs Python 3.12 or newer, this is {sys.version.split()[0]}: on an older one it saves no "
            "adapter and reports a file of 99999999 bytes."
        )
    return harness


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, metavar="PEFT", help="checkout of huggingface/peft")
    parser.add_argument("row", nargs="?", choices=ROWS, help="by default all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        harness = checked(options.peft)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if options.row is not None:
        run(harness, options.row)
        return
    for row in ROWS:  # what one leaves on the GPU would count as the other's
        subprocess.run([sys.executable, "-m", "benchmarks.metamath", str(options.peft), row], check=True)


if __name__ == "__main__":
    main()
