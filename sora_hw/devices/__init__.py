"""One frozen record per device type, and the choice between them."""

from sora_hw.devices.detect import BACKENDS, DEVICES, select
from sora_hw.devices.device import Check, Device, apply_environment
from sora_hw.devices.npu import load_or_hide

__all__ = ["BACKENDS", "DEVICES", "Check", "Device", "apply_environment", "load_or_hide", "select"]
