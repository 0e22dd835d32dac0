"""The tests of PEFT's suite that ask for LoRA's insides, each with the reason, and names of parameters read as ours."""

from __future__ import annotations

import functools

import pytest
from peft_suite.counterparts import StandIn

from sora_hw.conditioning import PRESETS, Conditioning

# Name of a test or class -> why it says nothing about another method.
_EXEMPT = {
    "TestDynamicDispatch": "LoRA's private way to register layers",
    "TestLayerRepr": "the printed names of LoRA's classes",
    "test_dora_save_and_load_remapping": "an earlier name of DoRA's parameter in LoRA's checkpoints",
    "test_mixed_adapter_batches_lora_with_dora_raises": "here a mixed batch with DoRA works",
    "test_mixed_adapter_batches_mha_raises": "refused: torch.nn.MultiheadAttention calls no layers",
    "test_unload_adapter_multihead_attention": "refused: torch.nn.MultiheadAttention calls no layers",
    "test_mha_gradients_set_correctly": "refused: torch.nn.MultiheadAttention calls no layers",
    "test_weighted_combination_of_adapters": "refused: ways to combine adapters that are not exact",
}
_HUB = "needs the model hub"


def exempt(item: pytest.Item) -> str | None:
    """Why a test does not apply, or None where it does."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("model_id") == "MHA":
        return "refused: torch.nn.MultiheadAttention calls no layers"
    names = (item.originalname, item.cls.__name__ if item.cls else "")
    return next((reason for name, reason in _EXEMPT.items() if name in names), None)


def only_in_lora(check):
    """PEFT's check of which parameters train, with LoRA's pair of names read as all that the preset has."""

    @functools.wraps(check)
    def checked(self, model, *names):
        ours = Conditioning(*PRESETS[StandIn.method]).parameter_names
        expected = []
        for name in names:
            if ".lora_A." in name:
                expected += [name.replace(".lora_A.", f".conditioned_{p}.").removesuffix(".weight") for p in ours]
            elif ".lora_B." not in name:
                expected.append(name)
        return check(self, model, *expected)

    return checked
