"""What the records say of themselves, and how an environment is applied."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from sora_hw.devices import DEVICES, apply_environment
from sora_hw.devices.cpu import CPU
from sora_hw.devices.cuda import CUDA
from sora_hw.devices.npu import NPU


def test_records_are_found_under_their_own_type():
    assert {name: device.type for name, device in DEVICES.items()} == {"npu": "npu", "cuda": "cuda", "cpu": "cpu"}


def test_each_device_speaks_through_its_own_library():
    backends = {device.type: device.communication_backend for device in DEVICES.values()}
    assert backends == {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
    assert {device.type: device.deepspeed_accelerator for device in DEVICES.values()} == {d: d for d in DEVICES}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_dtypes_are_torch_dtypes(device):
    assert all(getattr(torch, name).is_floating_point for name in device.dtypes)
    assert {"float32", "bfloat16"} <= set(device.dtypes)


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPU.type = "gpu"


def test_torch_devices_carry_an_index_except_the_one_cpu():
    assert CPU.torch_device(1) == torch.device("cpu")
    assert CUDA.torch_device(1) == torch.device("cuda", 1)


def test_the_npu_environment_leaves_the_two_linked_timeouts_alone():
    assert NPU.environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert NPU.environment["HCCL_CONNECT_TIMEOUT"] == "1800"
    assert not {"HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT", "TORCH_TRANSFER_TO_NPU"} & set(NPU.environment)


def test_what_the_user_has_set_stays():
    environ = {"KEPT": "user's", "EMPTY": "", "OTHER": "1"}
    applied = apply_environment({"KEPT": "ours", "EMPTY": "ours", "NEW": "ours"}, environ)
    assert applied == {"NEW": "ours"}
    assert environ == {"KEPT": "user's", "EMPTY": "", "OTHER": "1", "NEW": "ours"}


def test_cpu_is_always_usable_and_knows_its_memory():
    assert CPU.is_usable() is None
    assert CPU.count() == 1
    assert CPU.name()
    # An independent reading of the same facts: the kernel's own table.
    with open("/proc/meminfo") as table:
        total_kib = int(next(line for line in table if line.startswith("MemTotal")).split()[1])
    assert CPU.memory_bytes() == pytest.approx(total_kib * 1024, rel=0.01)


def test_cpu_peak_memory_follows_an_allocation():
    """In a process of its own: 1 GiB held for a moment on top of what the process holds stays in the peak."""
    code = (
        "import psutil\n"
        "from sora_hw.devices.cpu import CPU\n"
        "held = psutil.Process().memory_info().rss\n"
        "block = bytearray(b'x') * (1 << 30)\n"
        "del block\n"
        "print(held, CPU.peak_memory_bytes())"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    held, peak = map(int, answer.stdout.split())
    assert abs(peak - held - (1 << 30)) < 64 << 20  # in bytes, not in KiB


@pytest.mark.gpu
def test_a_gpu_reports_its_memory():
    assert CUDA.count() >= 1
    assert CUDA.name()
    assert CUDA.memory_bytes() > 1 << 30
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=CUDA.torch_device(0))
    assert CUDA.peak_memory_bytes() >= held.nbytes


@pytest.mark.npu
def test_an_npu_reports_its_memory():
    assert NPU.count() >= 1
    assert NPU.name()
    assert NPU.memory_bytes() > 1 << 30
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=NPU.torch_device(0))
    assert NPU.peak_memory_bytes() >= held.nbytes
