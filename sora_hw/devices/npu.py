"""Ascend NPUs, through torch_npu.

Importing torch_npu where CANN is missing or incomplete fails, and both torch and transformers import it while they are
imported themselves. So `load_or_hide` comes before either: it looks at what the import needs, by the standard library
alone, then tries it, and where it fails nobody else gets to try.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from sora_hw.devices.device import Check, Device

DEVICE_NODES = Path("/dev")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so")
MODULE = "torch_npu"
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
SEPARATE = "torch refuses two accelerators in one environment"

_import_errors: list[str] = []


@dataclass(frozen=True)
class NpuDevice(Device):
    """The NPUs that torch_npu sees. On a 910C each of a package's two dies is one, with memory of its own."""

    def checks(self) -> Iterator[Check]:
        sound = True
        for check in (*_import_checks(), _home(), _visible(), _nodes()):
            sound = sound and check.problem is None
            yield check
        if sound:  # the import would break the process otherwise
            yield _import()

    def is_expected(self) -> bool:
        return _installed() or _node_count() > 0

    def count(self) -> int:
        import torch

        return torch.npu.device_count()

    def name(self, index: int = 0) -> str:
        """The SoC, as Ascend910B3 or Ascend910_9391."""
        import torch

        return torch.npu.get_device_name(index)

    def memory_bytes(self, index: int = 0) -> int:
        import torch

        return torch.npu.get_device_properties(index).total_memory

    def peak_memory_bytes(self) -> int:
        import torch

        return torch.npu.max_memory_allocated()

    def configure(self) -> dict[str, object]:
        """Prepared operators instead of one compilation for every shape, plain memory layouts, and full float32."""
        import torch

        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False
        torch.npu.matmul.allow_hf32 = False
        return {"jit_compile": False, "allow_internal_format": False, "matmul.allow_hf32": False}


def load_or_hide() -> None:
    """Import torch_npu where it is installed and sound; otherwise hide it, so that torch and transformers do without.

    To be called before torch is imported, which it does itself. What is missing is told by `NPU.is_usable`, where the
    device is asked for.
    """
    if MODULE in sys.modules or not _installed():  # loaded, or hidden by whoever does not want it
        return
    if not any(check.problem for check in _import_checks()):
        with _without_autoload():
            import torch  # noqa: F401
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # whatever the vendor's start-up raises
            _import_errors.append(" ".join(str(error).split()) or type(error).__name__)
    if not _loaded():
        sys.modules[MODULE] = None  # Python's own mark for a module that shall not be found
        os.environ[AUTOLOAD] = "0"


@contextmanager
def _without_autoload() -> Iterator[None]:
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        yield
    finally:
        del os.environ[AUTOLOAD]
        if before is not None:
            os.environ[AUTOLOAD] = before


def _import_checks() -> Iterator[Check]:
    """What importing torch_npu needs; nothing here imports torch."""
    torch_version, cuda = _version("torch") or "of an unknown version", _cuda_of_torch()
    problem = (
        f"torch {torch_version} is built for CUDA {cuda}, and {SEPARATE}: make an environment for the NPU, with a CPU "
        "build of torch and pip install 'sora_hw[npu]'"
    )
    yield Check("torch", f"{torch_version}, CUDA {cuda}" if cuda else torch_version, problem if cuda else None)

    if not _installed():
        yield Check(
            "torch_npu",
            "not installed",
            "torch_npu is not installed: install CANN, then pip install 'sora_hw[npu]' in an environment whose torch "
            "is a CPU build",
        )
        return
    npu_version = _version("torch_npu")
    wanted = re.match(r"\d+\.\d+", torch_version)
    fits = npu_version is None or wanted is None or npu_version.startswith(f"{wanted[0]}.")
    problem = f"torch_npu {npu_version} does not fit torch {torch_version}: pip install 'torch-npu=={{}}.*'"
    yield Check("torch_npu", npu_version or "installed", None if fits else problem.format(wanted[0]))

    if _loaded():
        yield Check("CANN", "loaded by torch_npu")
        return
    missing = next((name for name in CANN_LIBRARIES if not _loads(name)), None)
    problem = (
        f"CANN is missing ({missing} does not load): install CANN and source its set_env.sh; deepspeed's own launcher "
        f"needs {AUTOLOAD}=0 until then"
    )
    yield Check("CANN", f"{missing} does not load" if missing else "its libraries load", problem if missing else None)
    if _import_errors:
        yield _failed_import()


def _home() -> Check:
    home = os.environ.get("ASCEND_HOME_PATH")
    if home and Path(home).is_dir():
        return Check("ASCEND_HOME_PATH", home)
    state = f"{home} is no folder" if home else "is not set"
    problem = f"ASCEND_HOME_PATH {state}, and DeepSpeed looks CANN up there: source CANN's set_env.sh"
    return Check("ASCEND_HOME_PATH", home or "not set", problem)


def _visible() -> Check:
    """CANN takes a list of device numbers that ascends, and shows no device at all for any other."""
    variable = VISIBLE_DEVICES
    text = os.environ.get(variable)
    if text is None:
        return Check(variable, "not set: all devices")
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) == len(parts) and numbers == sorted(set(numbers)):
        return Check(variable, text)
    proposal = ",".join(map(str, sorted(set(numbers)))) if numbers else "a list as 0,1,2,3"
    return Check(
        variable,
        text or "empty",
        f"{variable}={text} hides every NPU, because it is not a strictly ascending list of numbers without blanks: "
        f"set it to {proposal}, or unset it",
    )


def _nodes() -> Check:
    if _loaded():
        return Check("devices", "those of torch_npu, which is loaded")
    problem = (
        "there is no NPU (/dev/davinci*): install the driver until npu-smi info works, or pass the container its NPUs"
    )
    return Check("devices", f"{_node_count()} of /dev/davinci*", None if _node_count() else problem)


def _failed_import() -> Check:
    reason = _import_errors[-1] if _import_errors else "it is hidden from this process"
    problem = f"torch_npu does not import ({reason}): install the CANN that its version asks for, or reinstall it"
    return Check("import", "fails", problem)


def _import() -> Check:
    load_or_hide()
    if not _loaded():
        return _failed_import()
    import torch

    if torch.npu.is_available():
        return Check("NPUs", f"{torch.npu.device_count()}, one rank each")
    visible = os.environ.get(VISIBLE_DEVICES)
    shown = f"{VISIBLE_DEVICES}={visible} names none that exists: compare" if visible else "look at"
    problem = f"torch_npu sees no NPU; {shown} npu-smi info, and whether another process holds it"
    return Check("NPUs", "none", problem)


def _loaded() -> bool:
    return sys.modules.get(MODULE) is not None


def _installed() -> bool:
    return _loaded() or PathFinder.find_spec(MODULE) is not None  # sees it where it is hidden, too


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch is built with, read off its file of versions: torch may not be imported yet."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version.cuda
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    found = re.search(r"^cuda\b[^=]*= *'([^']+)'", file.read_text(), re.MULTILINE) if file and file.exists() else None
    return found.group(1) if found else None


def _node_count() -> int:
    return sum(1 for _ in DEVICE_NODES.glob("davinci[0-9]*"))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


NPU = NpuDevice(
    type="npu",
    display_name="Ascend NPU",
    communication_backend="hccl",
    deepspeed_accelerator="npu",
    dtypes=("float32", "bfloat16", "float16"),
    # HCCL_EXEC_TIMEOUT and HCCL_EVENT_TIMEOUT stay with their defaults: the second must exceed the first, which a
    # value of ours beside one of the user's could break.
    environment={
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "INF_NAN_MODE_ENABLE": "1",
    },
    exported_prefixes=("ASCEND", "HCCL", "LD_LIBRARY", "PATH"),
)
