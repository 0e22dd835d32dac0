"""The configuration: presets, pairs, contradictions, and what is refused."""

import pytest
from peft import PeftConfig, PeftType

import sora_hw
from sora_hw.conditioning import PRESETS


@pytest.mark.parametrize(("method", "pair"), PRESETS.items())
def test_a_preset_and_its_pair_are_the_same(method, pair):
    by_name, by_pair = sora_hw.ConditionedConfig(method=method), sora_hw.ConditionedConfig(pre=pair[0], post=pair[1])
    assert (by_name.method, by_name.pre, by_name.post) == (by_pair.method, by_pair.pre, by_pair.post) == (method, *pair)


def test_the_paper_s_presets():
    assert PRESETS["sora"] == ("diagonal", "rotation")
    assert PRESETS["prediag"] == ("diagonal", "none")
    assert PRESETS["dora"] == ("none", "magnitude")
    assert PRESETS["pre_ortho"] == ("rotation", "none") and PRESETS["post_ortho"] == ("none", "rotation")


def test_defaults():
    config = sora_hw.ConditionedConfig()
    assert (config.method, config.r, config.alpha, config.dropout, config.rotation_rank) == ("sora", 16, 32, 0.05, 1)
    assert (config.rotation, config.rotation_scale, config.rotation_eps) == ("taylor", "bounded", 1.0)
    assert config.peft_type == PeftType.CONDITIONED == "CONDITIONED"


def test_a_pair_without_a_name_has_none():
    assert sora_hw.ConditionedConfig(pre="rotation", post="magnitude").method is None
    assert sora_hw.ConditionedConfig(post="magnitude").method == "dora"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lora", "pre": "diagonal"}, "contradicts pre='diagonal'"),
        ({"method": "sora", "post": "none"}, "contradicts post='none'"),
        ({"method": "solar"}, "choose one of lora"),
        ({"pre": "magnitude"}, "pre='magnitude' is unknown"),
        ({"post": "norm"}, "post='norm' is unknown"),
        ({"r": 0}, "r=0 must be"),
        ({"r": 2.5}, "r=2.5 must be"),
        ({"rotation_rank": -1}, "rotation_rank=-1 must be"),
        ({"rotation": "euler"}, "rotation='euler' is unknown"),
        ({"rotation_scale": "free"}, "rotation_scale='free' is unknown"),
        ({"rotation_eps": 0.0}, "rotation_eps=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"dropout": None}, "dropout=None must be a finite number"),
        ({"alpha": float("nan")}, "alpha=nan must be a finite number"),
        ({"alpha": "16"}, "alpha='16' must be a finite number"),
        ({"rotation_eps": float("inf")}, "rotation_eps=inf must be a finite number"),
        ({"bias": "some"}, "bias='some' is unknown"),
        ({"init_weights": "svd"}, "init_weights='svd' is unknown: choose one of True, False, pissa, olora"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is not supported"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as refusal:
        sora_hw.ConditionedConfig(**options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options", [{"method": m} for m in PRESETS] + [{"pre": "rotation", "post": "magnitude"}])
def test_round_trip_through_a_file(tmp_path, options):
    config = sora_hw.ConditionedConfig(
        **options, r=5, alpha=7, rotation="cayley", rotation_scale="reference", rotation_eps=0.5, target_modules=["a"]
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, sora_hw.ConditionedConfig)
    assert loaded.to_dict() == config.to_dict() | {"auto_mapping": loaded.auto_mapping}
