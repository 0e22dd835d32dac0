"""Which device a run uses: what `--backend` names, or the best that is really usable."""

from __future__ import annotations

import logging
import os
from types import MappingProxyType

from sora_hw.devices.cpu import CPU
from sora_hw.devices.cuda import CUDA
from sora_hw.devices.device import Device
from sora_hw.devices.npu import NPU
from sora_hw.errors import UserError

# In the order of preference of `auto`.
DEVICES = MappingProxyType({device.type: device for device in (NPU, CUDA, CPU)})
BACKENDS = ("auto", *sorted(DEVICES))
FALLBACK_VARIABLE = "SORA_HW_FALLBACK"

logger = logging.getLogger(__name__)


def select(backend: str) -> Device:
    """The device of a run.

    Args:
        backend: one of `BACKENDS`; "auto" is the first of npu, cuda and cpu that is usable and that a kernel package
            serves. A device that is passed over although the machine is meant to use it is named in a warning.

    Raises:
        UserError: the named device is not usable or has no kernels, or `auto` finds none.
    """
    if backend == "auto":
        return _first_ready()
    if backend not in DEVICES:
        raise UserError(f"--backend {backend} is unknown: choose one of {', '.join(BACKENDS)}")
    device = DEVICES[backend]
    if missing := device.is_usable() or missing_kernels(device):
        raise UserError(f"--backend {backend} cannot be used: {missing}")
    return device


def missing_kernels(device: Device) -> str | None:
    """None where the operators can run on `device`; otherwise one line: what is missing and what to do."""
    from sora_hw import ops

    if ops.serving(device.type) or fallback_allowed():
        return None
    broken = next((p for p in ops.kernel_packages() if p.device_type == device.type), None)
    if broken:
        return (
            f"its kernel package {broken.module} ({broken.distribution}) does not import ({broken.error}): reinstall it"
        )
    served = ", ".join(p.device_type for p in ops.kernel_packages() if p.error is None) or "none"
    return (
        f"no kernel package serves {device.type} (served: {served}): install one for it, "
        f"or set {FALLBACK_VARIABLE}=1 to run the slow generic operators"
    )


def fallback_allowed() -> bool:
    """Whether the user has asked for the slow generic operators where no kernel package serves the device."""
    return os.environ.get(FALLBACK_VARIABLE) == "1"


def _first_ready() -> Device:
    reasons = []
    for device in DEVICES.values():
        unusable = device.is_usable()
        missing = unusable or missing_kernels(device)
        if missing is None:
            return device
        if unusable is None or device.is_expected():
            logger.warning("--backend auto passes over the %s: %s", device.display_name, missing)
        reasons.append(f"{device.type}: {missing}")
    raise UserError(f"no device can be used ({'; '.join(reasons)})")
