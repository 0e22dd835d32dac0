"""Fine-tune on mathematical questions.

deepspeed launchers/metamath.py --help
deepspeed --num_accelerators 4 launchers/metamath.py --backend cuda --hardware 4x4090
deepspeed --num_accelerators 8 launchers/metamath.py --backend npu --hardware 8x910c
python launchers/metamath.py --backend cpu --train-data FILE                     # first steps, with the tiny model
"""

import sys

import before_torch  # noqa: F401  (what torch reads while it is imported must stand before)

from sora_hw.recipes import metamath
from sora_hw.training.launch import main

if __name__ == "__main__":
    sys.exit(main(metamath))
