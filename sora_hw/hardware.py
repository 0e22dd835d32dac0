"""Hardware profiles: what a run may assume of the machine, and how a global batch is spread over its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from sora_hw.devices import Device
from sora_hw.errors import UserError


@dataclass(frozen=True)
class Profile:
    """One kind of machine.

    Attributes:
        name: what `--hardware` calls it.
        device: the device type.
        ranks: how many ranks the machine runs; None for as many as were started.
        memory_gib_per_rank: GiB of one rank's device; None where it is read from the device.
        micro_batch: the sequences of one rank's forward pass, as many as fit.
        zero_stage: DeepSpeed's ZeRO stage.
        dtype: of the base model; the adapter is always float32.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        fused_loss: whether Liger computes the loss of a vocabulary in pieces, never holding all logits.
        offload: whether optimiser states, and under ZeRO-3 the base model as well, lie in the host's memory.
        four_bit: whether the frozen base is held in 4 bits (bitsandbytes' NF4).
        peer_timeout: seconds after which a rank that gives no sign of life, or stays behind the others, is lost.
        environment: variables that the machine needs, beyond those of its device type.
    """

    name: str
    device: str
    ranks: int | None
    memory_gib_per_rank: float | None
    micro_batch: int
    zero_stage: int
    dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool
    fused_loss: bool = False
    offload: bool = False
    four_bit: bool = False
    peer_timeout: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)


# An 8B base in bfloat16 takes 15 GiB: it fits each rank whole, so ZeRO-2 spares the all-gathers of ZeRO-3, and
# checkpointing leaves room for the micro-batch. ZeRO-0 is for float32 only: in bfloat16 its losses drift from the rest.
PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                name="cpu",
                device="cpu",
                ranks=None,
                memory_gib_per_rank=None,
                micro_batch=8,
                zero_stage=2,
                dtype="float32",
                gradient_checkpointing=False,
                peer_timeout=120.0,
            ),
            Profile(
                name="4x4090",
                device="cuda",
                ranks=4,
                memory_gib_per_rank=24.0,
                micro_batch=4,
                zero_stage=2,
                dtype="bfloat16",
                gradient_checkpointing=True,
                # The float32 logits of 4 x 512 tokens of 128,256 words are a gigabyte, their gradient another.
                fused_loss=True,
                # These cards have neither NVLink nor peer-to-peer access: NCCL can hang when it tries them.
                environment={"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
            ),
            Profile(
                name="8x910c",
                device="npu",
                ranks=8,
                memory_gib_per_rank=64.0,
                micro_batch=16,
                zero_stage=2,
                dtype="bfloat16",
                gradient_checkpointing=True,
            ),
        )
    }
)
HARDWARE = ("auto", *PROFILES)
# In the place of a profile's values where a recipe tunes an encoder: 128 tokens of 184 million parameters take little
# memory, so a rank takes its whole share of a batch at once and recomputes nothing, and logits are no matter.
ENCODER: Mapping[str, object] = MappingProxyType(
    {"micro_batch": 32, "gradient_checkpointing": False, "fused_loss": False}
)


def choose(name: str, device: Device) -> Profile:
    """The profile of a run.

    Args:
        name: one of `HARDWARE`. A named profile is taken as it stands, whatever the device, so that a run for another
            machine can be planned here; "auto" takes the values of the profile of the device's type, for however many
            ranks and however much memory there are.
        device: what the run uses.

    Raises:
        UserError: `name` is unknown.
    """
    if name == "auto":
        return _like_profile_of(device)
    if name not in PROFILES:
        raise UserError(f"--hardware {name} is unknown: choose one of {', '.join(HARDWARE)}")
    return PROFILES[name]


def _like_profile_of(device: Device) -> Profile:
    profile = next(profile for profile in PROFILES.values() if profile.device == device.type)
    if profile.ranks is None:
        return profile
    # The variables of a 4090 would slow down a GPU that has the faster paths.
    environment = profile.environment if "4090" in device.name() else {}
    return replace(
        profile, name=f"auto ({profile.name})", ranks=None, memory_gib_per_rank=None, environment=environment
    )


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch = world_size * micro_batch * accumulation`, all counted in sequences, ranks or steps."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int


def batch_plan(global_batch: int, world_size: int, micro_batch: int) -> BatchPlan:
    """Spread a global batch over the ranks, exactly.

    Raises:
        UserError: a number is not positive, or the global batch is no multiple of world size x micro-batch; the
            message proposes the nearest values that are legal.
    """
    numbers = (("--global-batch", global_batch), ("the number of ranks", world_size), ("--micro-batch", micro_batch))
    for what, value in numbers:
        if value <= 0:
            raise UserError(f"{what} {value}: must be at least 1")
    together = world_size * micro_batch
    if global_batch % together:
        raise UserError(
            f"a global batch of {global_batch} cannot be split over {world_size} ranks with a micro-batch of "
            f"{micro_batch}: {_proposal(global_batch, world_size, micro_batch)}"
        )
    return BatchPlan(global_batch, world_size, micro_batch, global_batch // together)


def fitting_micro_batch(global_batch: int, world_size: int, largest: int) -> int | None:
    """The largest micro-batch up to `largest` that divides each rank's share of the global batch; None where the
    ranks cannot share it evenly."""
    share, rest = divmod(global_batch, world_size)
    if rest or share == 0:
        return None
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)


def _proposal(global_batch: int, world_size: int, micro_batch: int) -> str:
    together = world_size * micro_batch
    below, above = global_batch // together * together, math.ceil(global_batch / together) * together
    batches = " or ".join(str(batch) for batch in (below, above) if batch)
    proposal = f"use a global batch of {batches}"
    if (fitting := fitting_micro_batch(global_batch, world_size, micro_batch)) is not None:
        proposal += f", or a micro-batch of {fitting}"
    return proposal
