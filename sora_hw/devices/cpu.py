"""The processor itself: always usable, one device however many cores."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sora_hw.devices.device import Check, Device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CpuDevice(Device):
    """Ranks on the processor share its cores and its memory."""

    def checks(self) -> Iterator[Check]:
        yield Check("processor", self.name())

    def is_expected(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def name(self, index: int = 0) -> str:
        return _model_name() or platform.processor() or platform.machine()

    def memory_bytes(self, index: int = 0) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak_memory_bytes(self) -> int:
        import resource  # absent on Windows, where the library may still be imported

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def torch_device(self, index: int) -> torch.device:
        """The one CPU device: every local rank gets the same, without an index, as modules report it."""
        import torch

        return torch.device(self.type)


def _model_name() -> str | None:
    """The processor's name as Linux on x86 prints it; other systems do not tell it there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


CPU = CpuDevice(
    type="cpu",
    display_name="CPU",
    communication_backend="gloo",
    deepspeed_accelerator="cpu",
    dtypes=("float32", "bfloat16"),
    has_four_bit=True,
)
