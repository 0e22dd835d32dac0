"""Fine-tune an encoder on a task of GLUE.

deepspeed launchers/glue.py --help
deepspeed --num_accelerators 4 launchers/glue.py --task cola --backend cuda --hardware 4x4090
deepspeed --num_accelerators 8 launchers/glue.py --task cola --backend npu --hardware 8x910c
python launchers/glue.py --task rte --backend cpu --model FOLDER --train-data FILE --test-data FILE
"""

import sys

import before_torch  # noqa: F401  (what torch reads while it is imported must stand before)

from sora_hw.recipes import glue
from sora_hw.training.launch import main

if __name__ == "__main__":
    sys.exit(main(glue))
