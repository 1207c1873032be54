"""`python -m peft_mask`: the command line, as `peft-mask` is where the package is installed."""

import sys

from peft_mask.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
