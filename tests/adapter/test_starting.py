"""Starting from the base weight, PiSSA and OLoRA: with the base it is what the base was; ranks and alphas by layer."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import sora_hw
from sora_hw.conditioning import PRESETS


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Conv1d(20, 6, 1)).to(dtype)


def config(method, start, targets=("0", "1"), **options):
    return sora_hw.ConditionedConfig(
        method=method, r=4, alpha=6, dropout=0.0, init_weights=start, target_modules=list(targets), **options
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("method", PRESETS)
def test_base_and_adapter_are_together_what_the_base_was(method, start):
    x = torch.randn(20, 12, dtype=torch.float64)
    with torch.no_grad():
        before = base()[0](x)
    model = get_peft_model(base(), config(method, start, ["0"]))
    layer = model.base_model.model[0]
    assert (layer(x) - before).abs().max() < 1e-12
    assert not model.supports_lora_conversion()  # from the base that it would be loaded beside, it is not a difference
    with model.disable_adapter():
        assert (layer(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_factors_are_peft_s(start):
    ours = get_peft_model(base(torch.float32), config("lora", start, ["0"])).base_model.model[0]
    lora = LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=["0"])
    theirs = get_peft_model(base(torch.float32), lora).base_model.model[0]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert (ours.conditioned_B["default"] @ ours.conditioned_A["default"] - product).abs().max() < 1e-5
    assert (ours.get_base_layer().weight - theirs.get_base_layer().weight).abs().max() < 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_finds_the_same_base(low_cpu_mem_usage, tmp_path):
    model = get_peft_model(base(), config("sora", "pissa"), autocast_adapter_dtype=False)
    for value in model.parameters():
        if value.requires_grad:
            value.data.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
    )
    x = torch.randn(20, 12, dtype=torch.float64)
    assert (loaded(x) - model.eval()(x)).abs().max() < 1e-12


def test_it_must_be_the_only_adapter_and_have_the_rank():
    model = get_peft_model(base(), config("sora", "pissa"))
    with pytest.raises(ValueError, match="must be the only adapter"):
        model.add_adapter("second", config("sora", True))
    model = get_peft_model(base(), config("sora", True))
    with pytest.raises(ValueError, match="must be the only adapter"):
        model.add_adapter("second", config("sora", "olora"))
    with pytest.raises(ValueError, match="needs r of at most 6 here, not 8"):
        get_peft_model(base(), sora_hw.ConditionedConfig(r=8, init_weights="pissa", target_modules=["1"]))


def test_layers_with_ranks_and_alphas_of_their_own():
    patterns = {"rank_pattern": {"1": 2}, "alpha_pattern": {"^0": 3}}
    first, second = get_peft_model(base(), config("lora", False, **patterns)).base_model.model
    assert (len(first.conditioned_A["default"]), first.scaling["default"]) == (4, 3 / 4)
    assert (len(second.conditioned_A["default"]), second.scaling["default"]) == (2, 6 / 2)
