"""The name by which programs of before import `load_file`; the scripts' code is in `peft_mask.recipes`."""

from peft_mask.recipes.files import load_file

__all__ = ["load_file"]
