"""The launchers decide before torch is imported whether it may load vendors' device extensions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
SHOW = "import os, sys, before_torch; print(os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("arguments", "autoload"),
    [
        (["--backend", "cpu"], "0"),
        (["--local_rank=0", "--backend=cuda", "--seed", "1"], "0"),
        (["--backend", "npu"], "None"),
        (["--backend=auto"], "None"),
        (["--backend"], "None"),
        ([], "None"),
    ],
)
def test_autoload_follows_the_backend(arguments, autoload):
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    command = [sys.executable, "-S", "-c", SHOW, *arguments]
    done = subprocess.run(command, cwd=LAUNCHERS, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [autoload, "False"]
