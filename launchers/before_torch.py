"""Imported first by every launcher, before anything that imports torch; standard library only.

torch loads vendors' device extensions while it is imported, and a broken one ends the program there. A run that names
the processor or an NVIDIA GPU needs none of them. And PEFT imports bitsandbytes where it is installed, which then tells
what it could not load; the one line of an error should stand alone.
"""

import logging
import os
import re
import sys


def backend(arguments: list[str]) -> str:
    """The value of --backend, or "auto"; the launcher's own parser reports wrong ones."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--backend="):
            return argument.partition("=")[2]
        if argument == "--backend" and position + 1 < len(arguments):
            return arguments[position + 1]
    return "auto"


if re.fullmatch("cpu|cuda", backend(sys.argv[1:])):
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
