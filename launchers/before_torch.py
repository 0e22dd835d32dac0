"""Imported first by every launcher, before anything that imports torch; standard library only.

torch loads vendors' device extensions while it is imported, and a broken one ends the program there. A run that names
the processor or an NVIDIA GPU needs none of them. DeepSpeed decides for an accelerator when it is first imported, which
a library may do early. And PEFT imports bitsandbytes where it is installed, which then tells what it could not load;
the one line of an error should stand alone.

And what is imported stays: Python shall not look through it for garbage, again and again while more is imported, which
takes a fifth of the start. `sora_hw.training.launch` lets it look again, but for what is there by then.
"""

import gc
import logging
import os
import sys


def backend(arguments: list[str]) -> str:
    """The last value of --backend, or "auto"; the launcher's own parser reports wrong ones."""
    value = "auto"
    for argument, following in zip(arguments, [*arguments[1:], value], strict=False):
        if argument == "--backend":
            value = following
        elif argument.startswith("--backend="):
            value = argument.partition("=")[2]
    return value


named = backend(sys.argv[1:])
if named in ("cpu", "cuda", "npu"):
    os.environ["DS_ACCELERATOR"] = named
if named in ("cpu", "cuda"):
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.modules["torch_npu"] = None  # transformers would import it, sound or not
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
gc.disable()
