"""The PEFT method: configuration, layer, model and their registration with PEFT."""

from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.layer import ConditionedLinear
from sora_hw.adapter.model import ConditionedModel
from sora_hw.adapter.registration import register

__all__ = ["ConditionedConfig", "ConditionedLinear", "ConditionedModel", "register"]
