"""What the launchers decide before torch is imported: which device extensions it loads, and DeepSpeed's accelerator."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sora_hw.devices import DEVICES
from sora_hw.training.launch import exit_code

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
SHOW = """
import gc, os, sys, before_torch
print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"), os.environ.get("DS_ACCELERATOR"), "torch" in sys.modules)
print("torch_npu" in sys.modules, gc.isenabled())
"""


@pytest.mark.parametrize(
    ("arguments", "autoload", "accelerator"),
    [
        (["--backend", "cpu"], "0", "cpu"),
        (["--local_rank=0", "--backend=cuda", "--seed", "1"], "0", "cuda"),
        (["--backend", "npu"], "None", "npu"),
        (["--backend", "npu", "--backend", "cpu"], "0", "cpu"),
        (["--backend=auto"], "None", "None"),
        (["--backend"], "None", "None"),
        ([], "None", "None"),
    ],
)
def test_the_environment_follows_the_backend(arguments, autoload, accelerator):
    ours = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-S", "-c", SHOW, *arguments]
    done = subprocess.run(command, cwd=LAUNCHERS, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [autoload, accelerator, "False", str(autoload == "0"), "False"]


def test_it_knows_every_device():
    """It names the devices itself: it comes before the first import of the library."""
    source = (LAUNCHERS / "before_torch.py").read_text()
    assert set(re.findall(r'"(\w+)"', source.split("named = ")[1].splitlines()[1])) == set(DEVICES)


def test_garbage_is_looked_for_again_but_not_in_what_was_imported():
    seen = []
    gc.disable()
    try:
        assert exit_code(lambda: seen.append((gc.isenabled(), gc.get_freeze_count())), "") == 0
    finally:
        gc.enable()
        gc.unfreeze()
    ((enabled, frozen),) = seen
    assert enabled and frozen > 100_000
    assert exit_code(lambda: seen.append(gc.get_freeze_count()), "") == 0 and seen[-1] == 0, "a caller's is left alone"
