"""NVIDIA GPUs."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from sora_hw.devices.device import Device


@dataclass(frozen=True)
class CudaDevice(Device):
    """The GPUs that torch's CUDA build sees."""

    def is_usable(self) -> str | None:
        import torch

        if not torch.backends.cuda.is_built():
            return (
                f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch in this environment, "
                "or choose --backend cpu"
            )
        if torch.cuda.is_available():
            return None
        if not _driver_loads():
            return "the NVIDIA driver is missing (libcuda.so.1 does not load): install it, until nvidia-smi works"
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return "CUDA_VISIBLE_DEVICES hides every GPU: unset it, or set it to the numbers that nvidia-smi shows"
        return "the NVIDIA driver shows no usable GPU: compare nvidia-smi and CUDA_VISIBLE_DEVICES"

    def count(self) -> int:
        import torch

        return torch.cuda.device_count()

    def name(self, index: int = 0) -> str:
        import torch

        return torch.cuda.get_device_name(index)

    def memory_bytes(self, index: int = 0) -> int:
        import torch

        return torch.cuda.get_device_properties(index).total_memory

    def peak_memory_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()


def _driver_loads() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


CUDA = CudaDevice(
    type="cuda",
    display_name="NVIDIA GPU",
    communication_backend="nccl",
    deepspeed_accelerator="cuda",
    dtypes=("float32", "bfloat16", "float16"),
)
