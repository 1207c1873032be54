"""Learn a mask for classifying texts or pairs of texts; `--help` says how. All of it is in peft_mask/recipes."""

from peft_mask.recipes import launched
from peft_mask.recipes.text_classification import main

if __name__ == "__main__":
    launched.run(main)
