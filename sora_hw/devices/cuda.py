"""NVIDIA GPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sora_hw.devices.device import Check, Device

DEVICE_NODES = Path("/dev")


@dataclass(frozen=True)
class CudaDevice(Device):
    """The GPUs that torch's CUDA build sees."""

    def checks(self) -> Iterator[Check]:
        import torch

        built = torch.backends.cuda.is_built()
        problem = (
            f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch in this environment, "
            "or choose --backend cpu"
        )
        yield Check("torch", f"{torch.__version__}, CUDA {torch.version.cuda}", None if built else problem)
        available = built and torch.cuda.is_available()
        yield _driver(available)
        yield _visible()
        problem = "the NVIDIA driver shows no usable GPU: compare nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield Check("GPUs", str(self.count() if available else 0), None if available else problem)

    def is_expected(self) -> bool:
        import torch

        return torch.backends.cuda.is_built() and any(DEVICE_NODES.glob("nvidia[0-9]*"))

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


def is_capturing() -> bool:
    """Whether the current stream is captured into a CUDA graph, where nothing may wait for the device."""
    import torch

    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _driver(works: bool) -> Check:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not works:
            problem = "the NVIDIA driver is missing (libcuda.so.1 does not load): install it, until nvidia-smi works"
            return Check("driver", "libcuda.so.1 does not load", problem)
    return Check("driver", "loads")


def _visible() -> Check:
    variable = "CUDA_VISIBLE_DEVICES"
    text = os.environ.get(variable)
    if text not in ("", "-1"):
        return Check(variable, "not set: all devices" if text is None else text)
    problem = f"{variable} hides every GPU: unset it, or set it to the numbers that nvidia-smi shows"
    return Check(variable, text or "empty", problem)


CUDA = CudaDevice(
    type="cuda",
    display_name="NVIDIA GPU",
    communication_backend="nccl",
    deepspeed_accelerator="cuda",
    dtypes=("float32", "bfloat16", "float16"),
    has_fused_loss=True,
    has_four_bit=True,
    exported_prefixes=("NCCL",),
)
