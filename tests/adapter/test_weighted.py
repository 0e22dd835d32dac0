"""A weighted sum of adapters is the sum of their differences from the base weight, for every preset."""

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import sora_hw
from sora_hw.conditioning import POST, PRE

PAIRS = list(itertools.product(PRE, POST))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 3)).double()


def config(pre, post, targets=("0", "1"), **options):
    options = {"r": 3, "rotation_rank": 2, "rotation": "exp", "dropout": 0.0, "init_weights": False} | options
    return sora_hw.ConditionedConfig(pre=pre, post=post, target_modules=list(targets), **options)


@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_the_sum_is_exact(pre, post, tmp_path):
    model = get_peft_model(base(), config(pre, post), "first")
    model.add_adapter("second", config("diagonal", "rotation", ["1"], alpha=5))
    model.add_weighted_adapter(["first", "second", "first"], [0.4, -1.5, 0.3], "sum")
    for i, layer in enumerate(model.base_model.model[:2]):
        wanted = 0.7 * layer.get_delta_weight("first")
        if i == 1:
            wanted = wanted - 1.5 * layer.get_delta_weight("second")
        assert wanted.abs().max() > 1e-2
        assert (layer.get_delta_weight("sum") - wanted).abs().max() < 1e-12
        assert not any(value.requires_grad for value in layer.adapter_parameters("sum").values())
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "sum", autocast_adapter_dtype=False)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert (loaded(x) - model.eval()(x)).abs().max() < 1e-12


def test_with_weights_of_one_it_is_both_at_once():
    model = get_peft_model(base(), config("diagonal", "rotation"), "first")
    model.add_adapter("second", config("none", "magnitude"))
    model.base_model.set_adapter(["first", "second"])
    x = torch.randn(4, 12, dtype=torch.float64)
    both = model.eval()(x)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert (model(x) - both).abs().max() < 1e-12


def test_the_head_of_the_one_adapter_that_has_one_goes_along():
    model = get_peft_model(base(), config("none", "none", modules_to_save=["2"]), "first")
    model.add_adapter("second", config("none", "none"))
    head = model.base_model.model[2]
    head.modules_to_save["first"].weight.data.normal_()
    model.add_weighted_adapter(["second", "first"], [1.0, 1.0], "sum")
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["first"].weight)


def test_what_has_no_exact_sum_is_refused_and_nothing_is_added():
    model = get_peft_model(base(), config("none", "none"), "first")
    model.add_adapter("biased", config("diagonal", "none", condition_bias=True))
    cases = {
        "is not exact": (["first"], "ties"),
        "changes biases or tokens": (["first", "biased"], "cat"),
        "Adapter other does not exist": (["other"], "cat"),
    }
    for words, (names, how) in cases.items():
        with pytest.raises(ValueError, match=words):
            model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type=how)
    with pytest.raises(ValueError, match="2 weights do not fit 1 adapters"):
        model.add_weighted_adapter(["first"], [1.0, 2.0], "sum")
    assert set(model.peft_config) == {"first", "biased"}

    model = get_peft_model(base(), config("none", "none", init_weights="pissa"), "first")
    with pytest.raises(ValueError, match="started from the base weight"):
        model.add_weighted_adapter(["first"], [1.0], "sum")
    assert set(model.peft_config) == {"first"}


def test_an_adapter_less_itself_is_nothing():
    model = get_peft_model(base(), config("diagonal", "rotation"), "first")
    model.add_adapter("same", config("diagonal", "rotation"))
    for layer in model.base_model.model[:2]:
        for name, value in layer.adapter_parameters("same").items():
            value.data.copy_(layer.adapter_parameters("first")[name])
    model.add_weighted_adapter(["first", "same"], [1.0, -1.0], "nothing", combination_type="linear")
    for layer in model.base_model.model[:2]:
        assert layer.get_delta_weight("first").abs().max() > 1e-2
        assert layer.get_delta_weight("nothing").abs().max() < 1e-15
