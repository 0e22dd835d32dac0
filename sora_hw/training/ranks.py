"""The processes of a run: their environment, DeepSpeed's start, and who speaks."""

import logging
import os
import socket
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers

from sora_hw.devices.cpu import CPU
from sora_hw.devices.device import Device, apply_environment
from sora_hw.errors import UserError
from sora_hw.training.environment import whole_number
from sora_hw.training.plan import Plan


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
    changed = _set_environment(plan)
    import deepspeed  # reads the environment while it is imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if plan.device.type != CPU.type:  # otherwise every rank's first collective would run on device 0
        torch.accelerator.set_device_index(_own_device(plan.device))
    deepspeed.init_distributed(plan.device.communication_backend, verbose=False)
    return Settings(changed, plan.device.configure())


def leave() -> None:
    """End the ranks' process group, if there is one: what is left to do, each does by itself."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _own_device(device: Device) -> int:
    number, there = whole_number("LOCAL_RANK", least=0), device.count()
    if number >= there:
        raise UserError(
            f"this machine has started a rank number {number + 1} but has {there} x {device.display_name}: start as "
            f"many ranks as there are devices (--num_accelerators {there})"
        )
    return number


def _set_environment(plan: Plan) -> dict[str, str]:
    changed = {}
    if "RANK" not in os.environ:
        if plan.batch.world_size > 1:
            raise UserError("WORLD_SIZE is set but RANK is not: start by deepspeed or torchrun, or unset WORLD_SIZE")
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        changed |= apply_environment(alone | {"MASTER_PORT": str(_free_port())}, os.environ)
    os.environ["DS_ACCELERATOR"] = changed["DS_ACCELERATOR"] = plan.device.deepspeed_accelerator
    changed |= apply_environment(plan.device.environment, os.environ)
    changed |= apply_environment(plan.profile.environment, os.environ)
    if plan.device.type == CPU.type:  # ranks that each took every core would slow one another down
        share = max(1, _cores() // (whole_number("LOCAL_SIZE", least=1) or plan.batch.world_size))
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
