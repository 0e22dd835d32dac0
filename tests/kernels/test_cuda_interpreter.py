"""Every CUDA kernel against float64 on a machine without a GPU: Triton's interpreter runs them on CPU tensors.

Triton decides at its import whether to interpret, so the checks run in a process of their own; they stand in
interpreted_kernels.py beside this file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
CHECKS = Path(__file__).with_name("interpreted_kernels.py")


# Of many rows backward passes and rotations take minutes: `make test` has few of their options, `make test-full` all.
CHEAP = "not many-rows or test_forward or test_input_gradient or test_backward_without"
FEW_OPTIONS = (
    *("dtype0-many-rows-True-True-False", "dtype1-many-rows-False-False-True-True"),
    *("many-rows-True-bounded-True", "many-rows-False-reference-False"),
)


@pytest.mark.parametrize(
    ("chosen", "least"),
    [(" or ".join((CHEAP, *FEW_OPTIONS)), 300), pytest.param("many-rows", 40, marks=pytest.mark.full)],
    ids=["few options of many rows", "all of many rows"],
)
def test_every_kernel_in_the_interpreter(chosen, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(CHECKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "SORA_HW_INTERPRETED": "cuda"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = re.search(r"(\d+) passed", result.stdout)
    assert summary and int(summary[1]) > least and "skipped" not in result.stdout
