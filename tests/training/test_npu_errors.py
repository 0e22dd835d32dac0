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
# On a machine that is ready but for its devices: what the launcher says to each further fault, and to none.
FAULTS = f"""
import os, sys
sys.path.insert(0, {str(LAUNCHER.parent)!r})
import before_torch, torch
from sora_hw.recipes import commonsense
from sora_hw.training.launch import main
def told():
    print(main(commonsense, sys.argv[1:]))
told()
os.environ["ASCEND_RT_VISIBLE_DEVICES"] = "3,1"
told()
del os.environ["ASCEND_HOME_PATH"]
told()
torch.version.cuda = "13.0"  # a CUDA build, as far as the check can tell
told()
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
    assert done.stdout == ""
    (error,) = errors_of(done)
    return error


def errors_of(done) -> list[str]:
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: --backend npu cannot be used: ") for line in lines), done.stderr
    return [line.removeprefix("error: --backend npu cannot be used: ") for line in lines]


@pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="a machine with an NPU")
class TestErrors:
    def test_no_torch_npu(self, warm):
        done = warm.run([str(LAUNCHER), "--dry-run", "--backend", "npu"], LAUNCHER.parent, os.environ)
        assert error_of(done).startswith("torch_npu is not installed: install CANN, then pip")

    def test_no_cann(self, torch_npu):
        error = error_of(launched("--backend", "npu", **torch_npu))
        assert error.startswith(
            "CANN is missing (libascendcl.so does not load): install CANN and source its set_env.sh"
        )

    def test_one_fault_after_the_other(self, torch_npu, cann):
        """No device; then also device numbers that descend; then no ASCEND_HOME_PATH, either; and a torch for CUDA."""
        done = launched("--backend", "npu", program=("-c", FAULTS), **torch_npu, **cann)
        assert done.stdout.split() == ["2"] * 4, done.stderr
        no_device, descending, no_home, cuda = errors_of(done)
        assert no_device.startswith("torch_npu sees no NPU; look at npu-smi info")
        assert descending.startswith("ASCEND_RT_VISIBLE_DEVICES=3,1 hides every NPU") and "set it to 1,3" in descending
        assert no_home.startswith("ASCEND_HOME_PATH is not set") and no_home.endswith("source CANN's set_env.sh")
        assert "is built for CUDA 13.0" in cuda

    def test_a_cann_that_lacks_something(self, torch_npu, cann):
        """Known only from the import itself."""
        package = Path(torch_npu["PYTHONPATH"], "torch_npu", "__init__.py")
        package.write_text('raise ImportError("libgraph.so: cannot open shared object file")')
        error = error_of(launched("--backend", "npu", **torch_npu, **cann))
        assert error.startswith("torch_npu does not import (libgraph.so: cannot open shared object file): install the")


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
