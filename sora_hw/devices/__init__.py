"""One frozen record per device type, and the choice between them."""

from sora_hw.devices.detect import BACKENDS, DEVICES, select
from sora_hw.devices.device import Device, apply_environment

__all__ = ["BACKENDS", "DEVICES", "Device", "apply_environment", "select"]
