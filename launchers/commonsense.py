"""Fine-tune on commonsense questions.

    deepspeed launchers/commonsense.py --help
    deepspeed --num_accelerators 2 launchers/commonsense.py --backend cpu                          # first steps
    deepspeed --num_accelerators 4 launchers/commonsense.py --backend cuda --hardware 4x4090 --train-data FILE
    deepspeed --num_accelerators 8 launchers/commonsense.py --backend npu --hardware 8x910c --train-data FILE

On Ascend source CANN's set_env.sh first, and count ranks, not cards: a 910C is two devices, each with its own rank. On
several servers: deepspeed --hostfile FILE, of lines like `node1 slots=16`. `sora-hw doctor` checks each of them.
"""

import sys

import before_torch  # noqa: F401  (what torch reads while it is imported must stand before)

from sora_hw.recipes import commonsense
from sora_hw.training.launch import main

if __name__ == "__main__":
    sys.exit(main(commonsense))
