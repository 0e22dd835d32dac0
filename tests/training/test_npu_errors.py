"""`--backend npu` where it cannot work: six one-line errors, each with its own remedy, and no other backend disturbed.

The machine is set up step by step with stand-ins that do nothing: a torch_npu that torch loads by itself, that fails to
import as the real one does without CANN, and that sees no device; and empty libraries under CANN's names.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated_npu.building import install_cann

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launchers" / "commonsense.py"
TORCH = torch.__version__.partition("+")[0]
# A CUDA build of torch, as far as the check can tell.
CUDA_BUILD = """
import os, runpy, sys, torch
torch.version.cuda = "13.0"
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


TORCH_NPU = """
import ctypes
from types import SimpleNamespace
import torch
ctypes.CDLL("libhccl.so")
torch.npu = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
def _autoload(): pass
"""


@pytest.fixture
def torch_npu(tmp_path):
    """A folder with a torch_npu as torch finds it."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(TORCH_NPU)
    info = tmp_path / f"torch_npu-{TORCH}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {TORCH}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.fixture
def cann(tmp_path):
    """Empty libraries under the names of CANN's, and the variable that its set_env.sh sets."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    return {"LD_LIBRARY_PATH": str(install_cann(tmp_path / "cann")), "ASCEND_HOME_PATH": str(tmp_path / "cann")}


def launched(*arguments, program=(str(LAUNCHER),), **variables):
    hidden = ("ASCEND_HOME_PATH", "ASCEND_RT_VISIBLE_DEVICES", "TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, *program, "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables)


def error_of(done) -> str:
    """The one line that the launcher ended with."""
    assert done.returncode == 2, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and done.stdout == "", done.stderr
    assert lines[0].startswith("error: --backend npu cannot be used: ")
    return lines[0].removeprefix("error: --backend npu cannot be used: ")


@pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="a machine with an NPU")
class TestErrors:
    def test_no_torch_npu(self):
        assert error_of(launched("--backend", "npu")).startswith("torch_npu is not installed: install CANN, then pip")

    def test_a_cuda_torch(self):
        done = launched("--backend", "npu", program=("-c", CUDA_BUILD, str(LAUNCHER)))
        assert "is built for CUDA 13.0" in error_of(done)

    def test_no_cann(self, torch_npu):
        error = error_of(launched("--backend", "npu", **torch_npu))
        assert error.startswith(
            "CANN is missing (libascendcl.so does not load): install CANN and source its set_env.sh"
        )

    def test_no_ascend_home_path(self, torch_npu, cann):
        del cann["ASCEND_HOME_PATH"]
        error = error_of(launched("--backend", "npu", **torch_npu, **cann))
        assert error.startswith("ASCEND_HOME_PATH is not set") and error.endswith("source CANN's set_env.sh")

    def test_device_numbers_that_descend(self, torch_npu, cann):
        error = error_of(launched("--backend", "npu", **torch_npu, **cann, ASCEND_RT_VISIBLE_DEVICES="3,1"))
        assert error.startswith("ASCEND_RT_VISIBLE_DEVICES=3,1 hides every NPU") and "set it to 1,3" in error

    def test_no_device(self, torch_npu, cann):
        error = error_of(launched("--backend", "npu", **torch_npu, **cann))
        assert error.startswith("torch_npu sees no NPU; look at npu-smi info")

    def test_a_cann_that_lacks_something(self, torch_npu, cann):
        """Known only from the import itself."""
        package = Path(torch_npu["PYTHONPATH"], "torch_npu", "__init__.py")
        package.write_text('raise ImportError("libgraph.so: cannot open shared object file")')
        error = error_of(launched("--backend", "npu", **torch_npu, **cann))
        assert error.startswith("torch_npu does not import (libgraph.so: cannot open shared object file): install the")
        done = launched("--backend", "cpu", **torch_npu, **cann)
        assert done.returncode == 0 and done.stderr == ""


def test_without_cann_torch_itself_does_not_import(torch_npu):
    """What the launchers and the library guard against; if torch learns to, the guard can go."""
    done = subprocess.run([sys.executable, "-c", "import torch"], env=os.environ | torch_npu, capture_output=True)
    assert done.returncode != 0 and b"Failed to load the backend extension: torch_npu" in done.stderr


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_broken_torch_npu_disturbs_no_other_backend(torch_npu, backend):
    done = launched("--backend", backend, **torch_npu)
    assert done.returncode == 0, done.stderr
    assert ("passes over the Ascend NPU: CANN is missing" in done.stderr) == (backend == "auto")


def test_the_doctor_calls_it_broken(torch_npu):
    program = str(Path(sys.executable).with_name("sora-hw"))
    environment = os.environ | torch_npu | {"COLUMNS": "200"}
    done = subprocess.run([program, "doctor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "broken: npu: CANN is missing (libascendcl.so does not load)" in done.stdout
    assert "CANN                      │ libascendcl.so does not load │ broken" in done.stdout
