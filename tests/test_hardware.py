"""Profiles, and global batches spread over ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_hw.devices.cpu import CPU
from sora_hw.devices.cuda import CUDA, CudaDevice
from sora_hw.devices.npu import NPU, NpuDevice
from sora_hw.errors import UserError
from sora_hw.hardware import PROFILES, batch_plan, choose, fitting_micro_batch

SIZES = st.integers(1, 512)


def test_profiles_are_for_known_devices_in_dtypes_that_these_have():
    devices = {device.type: device for device in (CPU, CUDA, NPU)}
    assert set(PROFILES) == {"cpu", "4x4090", "8x910c"}
    for name, profile in PROFILES.items():
        assert profile.name == name
        assert profile.dtype in devices[profile.device].dtypes
        assert profile.zero_stage > 0 or profile.dtype == "float32"


@pytest.mark.parametrize("name", ["4x4090", "8x910c"])
def test_the_paper_s_machines_share_its_global_batch(name):
    """128 sequences on four and on eight ranks, with nothing left over."""
    profile = PROFILES[name]
    plan = batch_plan(128, profile.ranks, profile.micro_batch)
    assert plan.accumulation == {"4x4090": 8, "8x910c": 1}[name]


def test_a_named_profile_is_taken_as_it_stands():
    assert choose("4x4090", CPU) is PROFILES["4x4090"]
    assert choose("cpu", CPU) is PROFILES["cpu"]


def test_auto_on_the_cpu_is_the_cpu_profile():
    assert choose("auto", CPU) is PROFILES["cpu"]


@pytest.mark.parametrize(("card", "quiet"), [("NVIDIA GeForce RTX 4090", True), ("NVIDIA H200", False)])
def test_auto_on_a_gpu_takes_the_values_but_not_the_count(monkeypatch, card, quiet):
    monkeypatch.setattr(CudaDevice, "name", lambda self, index=0: card)
    profile = choose("auto", CUDA)
    template = PROFILES["4x4090"]
    assert (profile.ranks, profile.memory_gib_per_rank) == (None, None)
    assert (profile.micro_batch, profile.zero_stage, profile.dtype) == (4, 2, "bfloat16")
    assert profile.gradient_checkpointing
    assert profile.environment == (template.environment if quiet else {})
    assert template.environment == {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def test_auto_on_an_npu(monkeypatch):
    monkeypatch.setattr(NpuDevice, "name", lambda self, index=0: "Ascend910_9392")
    profile = choose("auto", NPU)
    assert (profile.device, profile.ranks, profile.micro_batch) == ("npu", None, 16)


def test_an_unknown_profile():
    with pytest.raises(UserError, match="--hardware 4x5090 is unknown: choose one of auto, cpu, 4x4090, 8x910c"):
        choose("4x5090", CPU)


@given(world_size=SIZES, micro_batch=SIZES, accumulation=SIZES)
def test_a_legal_global_batch_is_spread_exactly(world_size, micro_batch, accumulation):
    plan = batch_plan(world_size * micro_batch * accumulation, world_size, micro_batch)
    assert (plan.world_size, plan.micro_batch, plan.accumulation) == (world_size, micro_batch, accumulation)


@pytest.mark.parametrize(
    ("numbers", "proposal"),
    [
        ((100, 2, 8), "use a global batch of 96 or 112, or a micro-batch of 5"),
        ((4, 2, 8), "use a global batch of 16, or a micro-batch of 2"),
        ((128, 3, 8), "use a global batch of 120 or 144"),
        ((2, 3, 1), "use a global batch of 3"),
    ],
)
def test_an_impossible_split_proposes_the_nearest(numbers, proposal):
    with pytest.raises(UserError) as caught:
        batch_plan(*numbers)
    global_batch, world_size, micro_batch = numbers
    assert str(caught.value) == (
        f"a global batch of {global_batch} cannot be split over {world_size} ranks with a micro-batch of "
        f"{micro_batch}: {proposal}"
    )


@pytest.mark.parametrize(
    ("numbers", "what"), [((0, 1, 1), "--global-batch 0"), ((8, -1, 1), "ranks -1"), ((8, 1, 0), "--micro-batch 0")]
)
def test_numbers_must_be_positive(numbers, what):
    with pytest.raises(UserError, match=f"{what}: must be at least 1"):
        batch_plan(*numbers)


@given(global_batch=SIZES, world_size=st.integers(1, 64), largest=SIZES)
def test_the_fitting_micro_batch_is_the_largest_that_is_legal(global_batch, world_size, largest):
    legal = [size for size in range(1, largest + 1) if global_batch % (size * world_size) == 0]
    assert fitting_micro_batch(global_batch, world_size, largest) == (max(legal) if legal else None)
