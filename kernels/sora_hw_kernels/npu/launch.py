"""Whether Triton-Ascend's kernels can be launched here, which inputs they take, and how the cores share the tiles."""

import functools
import os
import shutil
from importlib.util import find_spec

import torch
from torch import Tensor

from sora_hw_kernels.triton_kernels.inputs import taken

# Set to 0, it leaves everything to the composition.
SWITCH = "SORA_HW_NPU_KERNELS"
# What Triton-Ascend makes binaries with.
COMPILER = "bishengir-compile"
# The most programs that one launch may have; ours have one a core.
GRID_LIMIT = 65_535
# The fewest AI cores of an Ascend 910B or a die of a 910C, for a driver that does not tell. Each has two vector cores.
DEFAULT_AI_CORES = 20


def describe() -> str:
    """What serves an NPU here, in one line: the kernels, or the composition and why."""
    reason = missing()
    return "Triton-Ascend kernels" if reason is None else f"composition of torch_npu operators ({reason})"


@functools.cache
def missing() -> str | None:
    """None where Triton-Ascend can launch kernels; otherwise why not, in one line."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        if find_spec("triton") is None or find_spec("triton.backends.ascend") is None:
            return "Triton-Ascend is not installed"
        from triton.runtime import driver

        backend = driver.active.get_current_target().backend
    except Exception as reason:  # whatever stops the vendor's compiler, the composition serves
        return f"Triton-Ascend has no driver: {type(reason).__name__}: {' '.join(str(reason).split())}"
    if backend != "npu":
        return f"Triton's driver is that of {backend}"
    if not shutil.which(COMPILER) and not os.environ.get("TRITON_NPU_COMPILER_PATH"):
        return f"{COMPILER}, which comes with CANN, is not on the PATH"
    return None


def takes(rows: Tensor, *coefficients: Tensor | None) -> bool:
    """Whether the kernels are there and take these inputs."""
    return rows.numel() > 0 and taken(rows, *coefficients) and missing() is None


def ai_cores(device: torch.device) -> int:
    """The AI cores of a device: each is a matrix (cube) unit with two vector cores."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index).get("num_aicore", DEFAULT_AI_CORES)


def vector_cores(device: torch.device) -> int:
    """The vector cores of a device, which run the kernels that multiply no matrices."""
    return 2 * ai_cores(device)


def share(tiles: int, cores: int) -> tuple[int, int]:
    """Programs, one a core but no more than there are tiles, and the steps in which they take all the tiles."""
    programs = min(tiles, cores, GRID_LIMIT)
    return programs, -(-tiles // programs)


def on_device_of(t: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.accelerator.device_index(t.device.index)
