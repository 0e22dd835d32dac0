"""Score what a run has trained, or a base model, on the tasks of the paper's tables.

python launchers/score.py --help
python launchers/score.py --adapter runs/mine --data FOLDER --backend cpu
deepspeed --num_accelerators 4 launchers/score.py --adapter runs/mine --data FOLDER --backend cuda
deepspeed --num_accelerators 8 launchers/score.py --model google/gemma-7b --tasks gsm8k --data FOLDER --backend npu

Interrupted, the same command goes on where it stopped, on any number of ranks.
"""

import sys

import before_torch  # noqa: F401  (what torch reads while it is imported must stand before)

from sora_hw.finished.score import main

if __name__ == "__main__":
    sys.exit(main())
