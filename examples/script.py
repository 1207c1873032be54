"""Where `load_file` was before the scripts' code moved to `peft_mask.recipes`: programs import it from here."""

from peft_mask.recipes.files import load_file

__all__ = ["load_file"]
