"""The module `torch.npu`: what transformers, accelerate, peft and DeepSpeed call of it, under torch_npu's names.

Where torch has the same function for every accelerator, that one stands here.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch.accelerator import current_device_index as current_device
from torch.accelerator import (
    current_stream,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
    set_stream,
    synchronize,
)
from torch.accelerator import get_memory_info as mem_get_info
from torch.accelerator import set_device_index as set_device

from torch_npu._C import device_count
from torch_npu.npu import random
from torch_npu.npu.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_cached",
    "memory_reserved",
    "memory_stats",
    "random",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_compile_mode",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]

# Older names, which DeepSpeed still uses.
memory_cached, max_memory_cached = memory_reserved, max_memory_reserved
reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

# Settings that change only how a real NPU computes.
config = SimpleNamespace(allow_internal_format=True)
matmul = SimpleNamespace(allow_hf32=False)
compile_mode = SimpleNamespace(jit_compile=True)

amp = SimpleNamespace(
    GradScaler=partial(torch.amp.GradScaler, "npu"),
    autocast=partial(torch.amp.autocast, "npu"),
)


@dataclass(frozen=True)
class DeviceProperties:
    """What `get_device_properties` tells: `total_memory` in bytes is a number to plan with, not this machine's."""

    name: str
    total_memory: int


class device(torch.accelerator.device_index):
    """A context in which `device` is the current one."""

    def __init__(self, device):
        super().__init__(_index(device))


class Stream(torch.Stream):
    """A stream; whatever is put on it has run when the call returns."""

    def __new__(cls, device=None, priority=0):
        return super().__new__(cls, device=torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False):
    """An event; recording keeps the time, waiting ends at once. Not a class: torch takes nothing but its own."""
    return torch.Event("npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)


def is_available():
    """Whether the process sees a device."""
    return device_count() > 0


def stream(stream):
    """A context in which `stream` is the current one; nothing changes for None."""
    return stream or nullcontext()


def default_stream(device=None):
    """The stream that every device has from the start."""
    npu = torch._C._autograd.DeviceType.PrivateUse1.value
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=npu)


def get_device_properties(device=None):
    """The properties of one device."""
    return DeviceProperties(name=get_device_name(device), total_memory=mem_get_info(_index(device))[1])


def get_device_name(device=None):
    """The name of one device, which says what it is."""
    if not 0 <= _index(device) < device_count():
        raise RuntimeError(f"simulated NPU: there is no device {device}")
    return "simulated NPU"


def is_bf16_supported():
    """As on every Ascend 910."""
    return True


def get_amp_supported_dtype():
    """The dtypes that autocast takes."""
    return [torch.float16, torch.bfloat16, torch.float32]


def set_compile_mode(jit_compile=False):
    """Operators are never compiled here; `compile_mode` tells what was asked for."""
    compile_mode.jit_compile = jit_compile


def init():
    """Nothing is left to be initialised once the extension is loaded."""


def is_initialized():
    """See `init`."""
    return True


_lazy_init = init
_initialized = True  # activation checkpointing keeps the random state of a device that is


def _lazy_call(callback):
    callback()


def _is_in_bad_fork():
    return False


def _index(device):
    return torch.accelerator._get_device_index(device, optional=True)


def __getattr__(name):
    # Not at the import: what the process sees is decided when it first asks for a device.
    if name == "default_generators":
        return random.default_generators()
    raise AttributeError(f"the simulated torch.npu has no {name}")


# The constructors DeepSpeed takes: `torch.npu.FloatTensor([1.0])`.
for _name, _dtype in {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}.items():
    globals()[_name] = partial(torch.tensor, dtype=_dtype, device="npu")
