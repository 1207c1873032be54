"""Learn a mask for tagging words; `--help` says how. It is peft_mask/recipes/token_classification.py."""

from peft_mask.recipes import launched
from peft_mask.recipes.token_classification import main

if __name__ == "__main__":
    launched.run(main)
