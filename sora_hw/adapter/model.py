"""Putting conditioned layers into a model: the tuner that PEFT asks for."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from sora_hw.adapter.checkpoint import check_tensors
from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.convolution import CONVOLUTIONS, ConditionedConvolution
from sora_hw.adapter.embedding import ConditionedEmbedding
from sora_hw.adapter.layer import ConditionedLinear
from sora_hw.adapter.mixed_batches import adapters_per_sample
from sora_hw.adapter.weighted import check_combinable, combined_config, weighted_sum


class ConditionedModel(BaseTuner):
    """A model whose target layers are `ConditionedLinear` or one of its kinds. Made by `peft.get_peft_model`.

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
        config = peft_config.at(current_key)
        if isinstance(target, ConditionedLinear):
            target.update_layer(adapter_name, config)
            return
        layer = _conditioned(target, adapter_name, config, current_key, get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train before it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """The layers bring their parameters to the right device; a module that comes back keeps what is its own."""
        setattr(parent, child_name, new_module)

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
        known = cls.known_names(model, adapter_name)
        own = re.compile(rf"(.*\.)?{cls.prefix}\w+\.{re.escape(adapter_name)}")
        # without a PeftModel around the model, only the checkpoint's names have the prefix
        names = {name if name in known else name.removeprefix("base_model.model.") for name in found}
        check_tensors(filter(own.fullmatch, known), names, known)
        return found

    @classmethod
    def known_names(cls, model: nn.Module, adapter_name: str) -> set[str]:
        """The names of tensors that a checkpoint of an adapter in this model may hold, those of the model with them."""
        names = set(model.state_dict())
        # PEFT also saves the trained biases of layers that are trained whole, by names that it does not read
        return names | {cls._remove_adapter_name_from_key(name, adapter_name) for name in names}

    # What PEFT's own LoRA does with `modules_to_save`; nothing in it is about LoRA.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: ConditionedConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying does not go with adapters on tied layers: a conditioned embedding scales and turns "
            "its features, which are the inputs of the tied output layer; leave the embedding out of target_modules"
        )

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat", **options
    ) -> None:
        """Add the weighted sum of adapters as an adapter of its own (`sora_hw.adapter.weighted`).

        Args:
            adapters: names of the adapters to sum.
            weights: their weights, of any sign.
            adapter_name: name of the sum. It does not train.
            combination_type: "cat" or "linear", both the exact sum.
            options: of PEFT's other ways to combine; as there, they do nothing in these.

        Raises:
            ValueError: for an unknown or a known name, or for what has no exact sum.
        """
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} exists already: choose another name or delete it first")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(weights)} weights do not fit {len(adapters)} adapters: give one for each")
        configs = {name: self.peft_config[name] for name in adapters}
        weight_of = dict.fromkeys(adapters, 0.0)
        for name, weight in zip(adapters, weights, strict=True):
            weight_of[name] += weight
        check_combinable(self.model, configs, combination_type)
        sums = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, ConditionedLinear) and (here := [a for a in configs if a in layer.conditioned_A]):
                sums[name] = weighted_sum(layer, {adapter: weight_of[adapter] for adapter in here})
        scales = any(part.delta is not None for part in sums.values())
        self.peft_config[adapter_name] = combined_config(configs, sums, scales)
        self.inject_adapter(self.model, adapter_name)
        for name, module in self.model.named_modules():
            if name in sums:
                for target, value in zip(("pre_delta", "A", "B"), sums[name], strict=True):
                    if value is not None:
                        getattr(module, f"conditioned_{target}")[adapter_name].data.copy_(value)
            elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                source = next(adapter for adapter in adapters if adapter in module.modules_to_save)
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
        self.set_requires_grad(adapter_name, requires_grad=False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = [module for module in self.model.modules() if isinstance(module, ConditionedLinear)]
        known = {name for layer in layers for name in layer.conditioned_A}
        with adapters_per_sample(self.model, names, known, beams=kwargs.get("num_beams") or 1):
            yield


def _conditioned(
    target: nn.Module, adapter_name: str, config: ConditionedConfig, name: str, quantization: dict[str, object]
) -> ConditionedLinear:
    """The layer around a target module. Raises for a kind that cannot be adapted."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Embedding):
        return ConditionedEmbedding(target, adapter_name, config)
    if isinstance(base, CONVOLUTIONS):
        return ConditionedConvolution(target, adapter_name, config)
    if isinstance(base, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"target module {name} is (part of) a torch.nn.MultiheadAttention, which reads the weights of its layers "
            "without calling them, so nothing would be conditioned: choose other target_modules"
        )
    if resolve_quantization_backend(base, **quantization) is not None:
        return ConditionedLinear(target, adapter_name, config, **quantization)
    stored_in_out = isinstance(base, Conv1D)
    if not stored_in_out and not isinstance(base, nn.Linear):
        raise ValueError(
            f"target module {name} is a {type(base).__name__}: only torch.nn.Linear, Embedding, Conv1d, Conv2d, Conv3d "
            "and transformers' Conv1D can be conditioned; choose other target_modules"
        )
    if config.fan_in_fan_out and not stored_in_out:
        warnings.warn(f"fan_in_fan_out=True does not fit {name}, a torch.nn.Linear: taken as False", stacklevel=2)
    return ConditionedLinear(target, adapter_name, config, fan_in_fan_out=stored_in_out)
