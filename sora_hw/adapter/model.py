"""Putting conditioned layers into a model: the tuner that PEFT asks for."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from sora_hw.adapter.checkpoint import check_tensors
from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.layer import ConditionedLinear


class ConditionedModel(BaseTuner):
    """A model whose target layers are `ConditionedLinear`. Made by `peft.get_peft_model`, not by hand.

    Raises:
        ValueError: for a target module of a kind that cannot be adapted.
    """

    prefix: str = "conditioned_"
    tuner_layer_cls = ConditionedLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: ConditionedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        if isinstance(target, ConditionedLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = ConditionedLinear(
            target, adapter_name, peft_config, fan_in_fan_out=_stored_in_out(target, current_key, peft_config)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train before it is made active
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in float32 or wider. Without `autocast_adapter_dtype` they take the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, ConditionedLinear):
                    module.cast_adapter_to_base_dtype(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ConditionedConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by their names in the model. PEFT calls it whenever it loads an adapter.

        Raises ValueError where one is missing or foreign: PEFT would leave it at that.
        """
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        model_names = set(model.state_dict())
        own = re.compile(rf"(.*\.)?{cls.prefix}\w+\.{re.escape(adapter_name)}")
        # PEFT also saves the trained biases of layers that are trained whole, by names that it does not read
        known = model_names | {cls._remove_adapter_name_from_key(name, adapter_name) for name in model_names}
        # without a PeftModel around the model, only the checkpoint's names have the prefix
        names = {name if name in known else name.removeprefix("base_model.model.") for name in found}
        check_tensors(filter(own.fullmatch, model_names), names, known)
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (another adapter for every sample) is not supported by conditioned adapters: "
                "run one batch per adapter with set_adapter"
            )
        yield


def _stored_in_out(target: nn.Module, name: str, config: ConditionedConfig) -> bool:
    """Whether the layer stores its weight as (in, out). Raises for a layer that is neither kind."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, Conv1D):
        stored = True
    elif isinstance(base, torch.nn.Linear):
        stored = False
    else:
        raise ValueError(
            f"target module {name} is a {type(base).__name__}: only torch.nn.Linear and transformers' Conv1D can be "
            "conditioned; choose other target_modules"
        )
    if config.fan_in_fan_out and not stored:
        warnings.warn(f"fan_in_fan_out=True does not fit {name}, a torch.nn.Linear: taken as False", stacklevel=2)
    return stored
