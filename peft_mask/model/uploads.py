"""The scores in a checkpoint's file, set aside while Trainer copies that file to the folder it uploads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from peft_mask.model.names import FOR_TRAINING


def set_scores_aside(file: Path, aside: Path) -> bool:
    """Leave the masks in an adapter's file, and keep the whole of it elsewhere.

    Each file is at any moment whole: the one with scores, or the one without.

    Args:
        file: an `adapter_model.safetensors`.
        aside: where the file with the scores goes to, on the same file system.

    Returns:
        Whether there were scores; if not, nothing has changed.
    """
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        published = {name: tensors.get_tensor(name) for name in names if not name.endswith(FOR_TRAINING)}
    if len(published) == len(names):
        return False
    masks_only = file.with_name(file.name + ".tmp")
    save_file(published, masks_only, metadata={"format": "pt"})
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:  # not every file system has hard links
        shutil.copyfile(file, aside)
    os.replace(masks_only, file)
    return True


def put_scores_back(file: Path, aside: Path) -> None:
    """Undo `set_scores_aside`; if the checkpoint has been deleted since, only clean up."""
    if file.parent.is_dir():
        os.replace(aside, file)
    else:
        aside.unlink(missing_ok=True)
