"""The tests of PEFT's suite that ask for LoRA's insides, each with the reason, and names of parameters read as ours."""

from __future__ import annotations

import functools
import re

import pytest
from peft_suite.counterparts import StandIn

from sora_hw.conditioning import PRESETS, Conditioning

_ATTENTION = "refused: torch.nn.MultiheadAttention calls no layers"
_VARIANTS = "a variant of LoRA"

# Name of a test or class -> why it says nothing about another method.
_EXEMPT = {
    "TestDynamicDispatch": "LoRA's private way to register layers",
    "TestLayerRepr": "the printed names of LoRA's classes",
    "TestLoraNestedConfigRoundTrip": "configurations of variants of LoRA",
    "test_dora_save_and_load_remapping": "an earlier name of DoRA's parameter in LoRA's checkpoints",
    "test_lora_layer_replication": "LoRA's way to repeat layers",
    "test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias": "a bias of LoRA's B",
    "test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises": "a bias of LoRA's B",
    "test_monteclora_variational_loss_computation": _VARIANTS,
    "test_monteclora_variational_loss_computation_eval_mode": _VARIANTS,
    "test_add_weighted_adapter_subtraction_with_negative_weights": (
        "LoRA's factors cancel before they are multiplied; an exact sum cancels to the rounding of float32, 1e-8"
    ),
    "test_mixed_adapter_batches_lora_with_dora_raises": "here a mixed batch with DoRA works",
    "test_mixed_adapter_batches_mha_raises": _ATTENTION,
    "test_unload_adapter_multihead_attention": _ATTENTION,
    "test_mha_gradients_set_correctly": _ATTENTION,
    "test_weighted_combination_of_adapters": "refused: ways to combine adapters that are not exact",
}
_EXACT = ("cat", "linear")


def exempt(item: pytest.Item) -> str | None:
    """Why a test does not apply, or None where it does."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("model_id") == "MHA":
        return _ATTENTION
    if parameters.get("mixed") is True:
        return "PeftMixedModel takes the methods of a closed list"
    if parameters.get("combination_type", "cat") not in _EXACT:
        return "refused: ways to combine adapters that are not exact"
    keywords = parameters.get("config_kwargs", {})
    if item.originalname == "test_only_params_are_updated" and "conv1d" in keywords["target_modules"]:
        turns = "rotation" in PRESETS[keywords["method"]]
        if turns and parameters["model_id"] in ("EmbConv1D", "Conv1d"):
            return "a layer with one output, where a rotation has no gradient"
    names = (item.originalname, item.cls.__name__ if item.cls else "")
    return next((reason for name, reason in _EXEMPT.items() if name in names), None)


def learns_like_dora(test: str, model: str | None, method: str) -> bool:
    """Whether a row should have DoRA's learning rate in a test, see `LikeDora`."""
    if test == "test_only_params_are_updated":
        return model == "EmbConv1D"
    return test == "test_parameters_after_loading_model" and Conditioning(*PRESETS[method]).scales


def only_in_lora(check):
    """PEFT's check of which parameters train, with LoRA's pair of names read as all that the preset has."""

    @functools.wraps(check)
    def checked(self, model, *names):
        ours = Conditioning(*PRESETS[StandIn.method]).parameter_names
        expected = []
        for name in names:
            if match := re.search(r"\.lora_(embedding_)?A\.", name):
                own = [name.replace(match[0], f".conditioned_{p}.").removesuffix(".weight") for p in ours]
                expected += own
            elif not re.search(r"\.lora_(embedding_)?B\.", name):
                expected.append(name)
        return check(self, model, *expected)

    return checked
