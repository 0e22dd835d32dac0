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


# Backward passes of many rows take minutes, and so do all rotations: `make test` has the former with few of their
# options, the latter with each two of theirs together, and `make test-full` has them all.
CHEAP = "not many-rows and not test_the_rotation or test_forward or test_input_gradient"
PAIRS = "True-bounded-True or True-reference-False or False-bounded-False or False-reference-True"
FEW_OPTIONS = (
    *("dtype0-many-rows-True-True-False", "dtype1-many-rows-False-False-True-True"),
    *("many-rows-True-bounded-True", "many-rows-False-reference-True"),
    f"test_the_rotation and not many-rows and ({PAIRS})",
)


@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        (" or ".join((CHEAP, *FEW_OPTIONS)), 300),
        pytest.param("many-rows or test_the_rotation", 80, marks=pytest.mark.full),
    ],
    ids=["few options", "all options"],
)
def test_every_kernel_in_the_interpreter(chosen, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(CHECKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "SORA_HW_INTERPRETED": "cuda"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = re.search(r"(\d+) passed", result.stdout)
    assert summary and int(summary[1]) > least and "skipped" not in result.stdout
