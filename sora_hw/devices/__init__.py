"""One frozen record per device type, and the choice between them."""

from sora_hw.devices.detect import BACKENDS, DEVICES, select
from sora_hw.devices.device import Check, Device, apply_environment
from sora_hw.devices.npu import hide_if_broken

__all__ = ["BACKENDS", "DEVICES", "Check", "Device", "apply_environment", "hide_if_broken", "select"]
