"""Builds the simulated `npu` device and gives it to a process; package/torch_npu/__init__.py tells what it is."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# In a folder of its own, or a program started from this one would find the package before it is built.
PACKAGE = Path(__file__).with_name("package") / "torch_npu"
# Beside the other builds of the repository; it survives the test run.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "simulated_npu"

# What a program looks for before it imports torch_npu. Here they hold nothing.
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so")

COMPILE = """
import sys
from torch.utils.cpp_extension import load
load("_C", sys.argv[2], build_directory=sys.argv[1], extra_cflags=["-DNDEBUG"])  # as torch itself is built
"""


@pytest.fixture(scope="session")
def simulated_npu(tmp_path_factory) -> dict[str, str]:
    """The environment variables that give a process the simulated device: `env={**os.environ, **simulated_npu}`.

    Never load it into the process of the tests: torch knows one device of this kind, and it cannot be unloaded.
    """
    if shutil.which(_compiler()) is None:
        pytest.skip(f"the simulated NPU needs a C++ compiler: {_compiler()} is not there (CXX names another)")
    site = tmp_path_factory.mktemp("simulated_npu")
    install(build_extension(), site)
    return {
        "PYTHONPATH": _first(site, "PYTHONPATH"),
        "LD_LIBRARY_PATH": _first(install_cann(site / "cann"), "LD_LIBRARY_PATH"),
        "ASCEND_HOME_PATH": str(site / "cann"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }


def _first(folder: Path, variable: str) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get(variable)])])


def build_extension() -> Path:
    """The compiled extension, from the cache where sources, torch and Python are those of an earlier build."""
    import torch

    sources = sorted((PACKAGE / "csrc").iterdir())
    key = hashlib.sha256(f"{torch.__version__} {sys.version} {_compiler()} {COMPILE}".encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = CACHE / key.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    # The lock ends with its process. A build that was broken off has not been renamed and so does not count.
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                _compile([source for source in sources if source.suffix == ".cpp"], Path(scratch))
                finished = Path(scratch) / "finished"
                finished.mkdir()
                shutil.move(Path(scratch) / "_C.so", finished)
                finished.rename(folder)
    return folder / "_C.so"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")  # as torch chooses it


def _compile(sources: list[Path], folder: Path) -> None:
    # As one source: to read torch's headers takes longer than to compile ours.
    together = folder / "together.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    # In a process of its own, because to build an extension is to load it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for ninja
    environment = {**os.environ, "PATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", COMPILE, str(folder), str(together)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"the simulated NPU does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def install(extension: Path, site: Path) -> None:
    """Put the package into `site`, as pip would: torch finds it by the entry point."""
    import torch

    shutil.copytree(PACKAGE, site / "torch_npu", ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    shutil.copy2(extension, site / "torch_npu")
    metadata = site / "torch_npu-0.dist-info"
    metadata.mkdir()
    version = torch.__version__.partition("+")[0]
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")


def install_cann(home: Path) -> Path:
    """Empty libraries under the names of CANN's, as far as a program asks for them; the folder that holds them."""
    folder = home / "lib64"
    folder.mkdir(parents=True)
    empty = folder / "empty.cpp"
    empty.touch()
    for library in CANN_LIBRARIES:
        subprocess.run([_compiler(), "-shared", str(empty), "-o", str(folder / library)], check=True)
    return folder


def run(simulated_npu: dict[str, str], *command: object, **variables: str) -> subprocess.CompletedProcess:
    """A Python program with the device, which must succeed."""
    environment = {**os.environ, **simulated_npu, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done


def run_checks(simulated_npu: dict[str, str], file: Path) -> int:
    """A file of tests in a process with the device; how many there were, all of them passed."""
    done = run(simulated_npu, "-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    summary = re.search(r"(\d+) passed", done.stdout)
    assert summary and "skipped" not in done.stdout
    return int(summary[1])
