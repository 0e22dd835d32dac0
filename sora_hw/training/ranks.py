"""The processes of a run: their environment, their start with or without DeepSpeed, and who speaks."""

import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers

from sora_hw.devices.cpu import CPU
from sora_hw.devices.device import Device, apply_environment
from sora_hw.errors import UserError
from sora_hw.hardware import Profile
from sora_hw.training.environment import number_of_ranks, whole_number
from sora_hw.training.plan import Plan

LONGEST_WAIT = timedelta(days=1)  # of a rank that has done its share for one that has not


@dataclass(frozen=True)
class Settings:
    """What was set for a run: environment variables, and switches of the device's library."""

    environment: dict[str, str]
    device: dict[str, object]


def start(plan: Plan) -> Settings:
    """Bring up the ranks' process group under DeepSpeed.

    A plain `python` run becomes a group of one rank. DeepSpeed's own start builds an extension for the processor with
    a C++ compiler; the ranks do as well without it, so it is declared unavailable.
    """
    changed = _set_environment(plan.device, plan.profile, plan.batch.world_size)
    import deepspeed  # reads the environment while it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _take_device(plan.device)
    deepspeed.init_distributed(plan.device.communication_backend, verbose=False)
    return Settings(changed, plan.device.configure())


def start_without_engine(device: Device, profile: Profile) -> Settings:
    """The same without DeepSpeed, for ranks that do not train: each goes its own way until all of them meet."""
    changed = _set_environment(device, profile, number_of_ranks() or 1)
    _take_device(device)
    dist.init_process_group(device.communication_backend, timeout=LONGEST_WAIT)
    return Settings(changed, device.configure())


def leave() -> None:
    """End the ranks' process group, if there is one: what is left to do, each does by itself."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _take_device(device: Device) -> None:
    if device.type != CPU.type:  # otherwise every rank's first collective would run on device 0
        torch.accelerator.set_device_index(_own_device(device))


def _own_device(device: Device) -> int:
    number, there = whole_number("LOCAL_RANK", least=0), device.count()
    if number >= there:
        raise UserError(
            f"this machine has started a rank number {number + 1} but has {there} x {device.display_name}: start as "
            f"many ranks as there are devices (--num_accelerators {there})"
        )
    return number


def _set_environment(device: Device, profile: Profile, world_size: int) -> dict[str, str]:
    changed = {}
    if "RANK" not in os.environ:
        if world_size > 1:
            raise UserError("WORLD_SIZE is set but RANK is not: start by deepspeed or torchrun, or unset WORLD_SIZE")
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        changed |= apply_environment(alone | {"MASTER_PORT": str(_free_port())}, os.environ)
    os.environ["DS_ACCELERATOR"] = changed["DS_ACCELERATOR"] = device.deepspeed_accelerator
    changed |= apply_environment(device.environment, os.environ)
    changed |= apply_environment(profile.environment, os.environ)
    if device.type == CPU.type:  # ranks that each took every core would slow one another down
        share = max(1, _cores() // (whole_number("LOCAL_SIZE", least=1) or world_size))
        changed |= apply_environment({"OMP_NUM_THREADS": str(share)}, os.environ)
        torch.set_num_threads(whole_number("OMP_NUM_THREADS", least=1))
    return changed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def silence() -> None:
    """Libraries' notes on their own workings would bury what the run has to say, and the one line of its errors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It is the right device: `start` has made it so.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    for name in ("accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
