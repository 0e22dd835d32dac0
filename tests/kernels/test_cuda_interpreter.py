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


def test_every_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "SORA_HW_INTERPRETED": "cuda"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = re.search(r"(\d+) passed", result.stdout)
    assert summary and int(summary[1]) > 100 and "skipped" not in result.stdout
