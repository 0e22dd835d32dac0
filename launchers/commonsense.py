"""Fine-tune on commonsense questions: `deepspeed launchers/commonsense.py --help`."""

import sys

import before_torch  # noqa: F401  (what torch reads while it is imported must stand before)

from sora_hw.recipes import commonsense
from sora_hw.training.run import main

if __name__ == "__main__":
    sys.exit(main(commonsense))
