"""LoRA and DoRA against PEFT's own at equal weights: outputs and every gradient, float32, dropout 0."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import sora_hw

TOLERANCE = 1e-5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 64), nn.Linear(64, 30, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(params=["lora", "dora"])
def pair(request):
    """The same adapter in PEFT's LoRA and in ours, and how PEFT's parameters are called in ours."""
    torch.manual_seed(0)
    net = Net()
    ours_config = sora_hw.ConditionedConfig(
        method=request.param, r=8, alpha=20, dropout=0.0, init_weights=False, target_modules=["up", "down"]
    )
    ours = get_peft_model(copy.deepcopy(net), ours_config)
    theirs_config = LoraConfig(
        r=8, lora_alpha=20, lora_dropout=0.0, use_dora=request.param == "dora", target_modules=["up", "down"]
    )
    theirs = get_peft_model(copy.deepcopy(net), theirs_config)
    names = {}
    for layer in ("up", "down"):
        names[f"base_model.model.{layer}.conditioned_A.default"] = f"base_model.model.{layer}.lora_A.default.weight"
        names[f"base_model.model.{layer}.conditioned_B.default"] = f"base_model.model.{layer}.lora_B.default.weight"
        if request.param == "dora":
            names[f"base_model.model.{layer}.conditioned_magnitude.default"] = (
                f"base_model.model.{layer}.lora_magnitude_vector.default.weight"
            )
    mine, peft = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert set(names) == {name for name, p in mine.items() if p.requires_grad}
    with torch.no_grad():
        for our_name, peft_name in names.items():
            peft[peft_name].copy_(mine[our_name])
    return ours, theirs, {our_name: (mine[our_name], peft[peft_name]) for our_name, peft_name in names.items()}


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(pair, training):
    ours, theirs, parameters = pair
    ours.train(training)
    theirs.train(training)
    x_ours = torch.randn(3, 9, 40, requires_grad=True)
    x_theirs = x_ours.detach().clone().requires_grad_()
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    assert (y_ours - y_theirs).abs().max() < TOLERANCE
    dy = torch.randn_like(y_ours)
    y_ours.backward(dy)
    y_theirs.backward(dy)
    assert (x_ours.grad - x_theirs.grad).abs().max() < TOLERANCE
    for name, (mine, peft) in parameters.items():
        scale = peft.grad.abs().max().clamp(min=1)
        assert (mine.grad - peft.grad).abs().max() / scale < TOLERANCE, name


def test_merged_weights(pair):
    ours, theirs, _ = pair
    for mine, peft in zip(ours.merge_and_unload().parameters(), theirs.merge_and_unload().parameters(), strict=True):
        assert (mine - peft).abs().max() < TOLERANCE


def test_dora_starts_from_the_same_magnitude():
    torch.manual_seed(0)
    net = Net()
    ours = get_peft_model(
        copy.deepcopy(net), sora_hw.ConditionedConfig(method="dora", target_modules=["up"])
    ).base_model.model.up.conditioned_magnitude["default"]
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(use_dora=True, target_modules=["up"]))
    assert torch.allclose(ours, theirs.base_model.model.up.lora_magnitude_vector["default"].weight, rtol=1e-6)
