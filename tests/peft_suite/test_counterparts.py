"""LoRA's keywords read as ours: nothing is dropped in silence, and the stand-in passes for LoRA's class."""

import pytest
from peft import IA3Config, LoraConfig, get_peft_model
from peft_suite.counterparts import NoCounterpart, StandIn, counterpart, given, presets_of, with_lora_defaults
from torch import nn

import sora_hw
from sora_hw.conditioning import PRESETS


def test_the_same_adapter_as_lora_makes_of_them():
    keywords = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "rank_pattern": {"0": 2}, "use_rslora": True}
    ours = sora_hw.ConditionedConfig(method="lora", **with_lora_defaults(counterpart(keywords)))
    lora, conditioned = (
        get_peft_model(nn.Sequential(nn.Linear(4, 6)), config).base_model.model[0]
        for config in (LoraConfig(**keywords), ours)
    )
    assert conditioned.scaling == lora.scaling
    assert conditioned.conditioned_A["default"].shape == lora.lora_A["default"].weight.shape == (2, 4)
    assert counterpart(given(LoraConfig(**keywords))) == counterpart(keywords)


def test_what_means_nothing_here_is_told_apart_from_what_is_unknown():
    with pytest.raises(NoCounterpart, match="a bias of LoRA's B"):
        counterpart({"lora_bias": True})
    with pytest.raises(NoCounterpart, match="MiCA"):
        counterpart({"init_lora_weights": "mica"})
    with pytest.raises(KeyError, match="neither translated nor written down"):
        counterpart({"a_new_keyword": 1})
    assert counterpart({"lora_bias": False, "bias": "lora_only"}) == {"bias": "conditioned_only"}


def test_a_row_is_for_every_preset_or_for_the_one_that_it_means():
    assert set(presets_of(counterpart({"r": 2}))) == set(PRESETS)
    assert set(presets_of(counterpart({"use_dora": True}))) == {"dora"}


def test_the_stand_in_passes_for_loras_class():
    config = StandIn(target_modules=["0"], lora_alpha=4)
    assert isinstance(config, StandIn) and (config.alpha, config.r, config.method) == (4, 8, "sora")
    assert sora_hw.ConditionedConfig in (IA3Config, StandIn) and issubclass(sora_hw.ConditionedConfig, StandIn)
    assert not issubclass(IA3Config, StandIn)
