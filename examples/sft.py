"""Teach a chat model to answer, by a mask; `--help` says how. It is peft_mask/recipes/sft.py."""

from peft_mask.recipes import launched
from peft_mask.recipes.sft import main

if __name__ == "__main__":
    launched.run(main)
