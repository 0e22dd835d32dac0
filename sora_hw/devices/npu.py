"""Ascend NPUs, through torch_npu.

Importing torch_npu on a machine without CANN fails and cannot be recovered from in the same process. So each step of
`is_usable` asks for the next thing that the import needs, and the import comes last.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from sora_hw.devices.device import Device

DEVICE_NODES = Path("/dev")


@dataclass(frozen=True)
class NpuDevice(Device):
    """The NPUs that torch_npu sees; on a 910C each of a package's two dies is one."""

    def is_usable(self) -> str | None:
        # torch may have loaded it already, as it does for every registered backend: then the import is no risk.
        if "torch_npu" not in sys.modules and (missing := _missing_for_import() or _import_error()):
            return missing
        import torch

        if not torch.npu.is_available():
            return (
                "torch_npu sees no NPU: compare npu-smi info and ASCEND_RT_VISIBLE_DEVICES, whose numbers must be "
                "strictly ascending"
            )
        return None

    def count(self) -> int:
        import torch

        return torch.npu.device_count()

    def name(self, index: int = 0) -> str:
        import torch

        return torch.npu.get_device_name(index)

    def memory_bytes(self, index: int = 0) -> int:
        import torch

        return torch.npu.get_device_properties(index).total_memory

    def peak_memory_bytes(self) -> int:
        import torch

        return torch.npu.max_memory_allocated()


def _missing_for_import() -> str | None:
    """The first thing, in the order of set-up, without which importing torch_npu would break the process."""
    if importlib.util.find_spec("torch_npu") is None:
        return (
            "torch_npu is not installed: install CANN, then pip install 'sora_hw[npu]' in an environment whose torch "
            "is a CPU build"
        )
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return (
            "CANN is missing (libascendcl.so does not load): install CANN and source its set_env.sh; until then set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0, or importing torch fails"
        )
    if not any(DEVICE_NODES.glob("davinci*")):
        return (
            "there is no NPU (/dev/davinci*): install the driver until npu-smi info works, or give the container the "
            "devices"
        )
    return None


def _import_error() -> str | None:
    try:
        import torch_npu  # noqa: F401
    except Exception as error:  # whatever the vendor's start-up raises is one more reason why it is not usable
        reason = " ".join(str(error).split())
        return f"torch_npu does not import ({reason}): install the torch-npu whose version is torch's, and its CANN"
    return None


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
)
