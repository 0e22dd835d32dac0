"""An adapter as an exact plain LoRA, against the dense formulas, and in PEFT's own LoRA."""

import copy
import itertools

import pytest
import torch
from dense import rotation
from dense import weight as dense_weight
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

import sora_hw
from sora_hw.adapter.export import layer_as_lora, lora_tensors
from sora_hw.conditioning import POST, PRE, PRESETS

PAIRS = list(itertools.product(PRE, POST))
IN, OUT, R, RP = 12, 20, 3, 2


def adapted(pre, post, base=None, dtype=torch.float32, **options):
    """A PEFT model around one layer, at a random point, and the layer itself."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT) if base is None else base
    options = {"r": R, "alpha": 6, "rotation_rank": RP, "dropout": 0.0, "init_weights": False} | options
    config = sora_hw.ConditionedConfig(pre=pre, post=post, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(base).to(dtype), config)
    return model, model.base_model.model[0]


def wide(layer):
    return {name: value.detach().double() for name, value in layer.adapter_parameters("default").items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["taylor", "cayley", "exp"])
@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_the_lora_beside_the_folded_weight_is_the_conditioned_weight(pre, post, form, dtype):
    _, layer = adapted(pre, post, dtype=dtype, rotation=form)
    lora = layer_as_lora(layer, "default")
    w0 = layer.get_base_layer().weight.detach().double()
    expected = dense_weight(w0, pre, post, wide(layer), 6 / R, kind=form)
    beside = w0 if lora.weight is None else lora.weight
    assert (beside + lora.b @ lora.a - expected).abs().max() < 1e-12
    assert len(lora.a) == R + 2 * RP * ((pre == "rotation") + (post == "rotation"))


@pytest.mark.parametrize("method", PRESETS)
def test_what_is_folded_is_a_diagonal_and_no_more(method):
    folds = method in ("dora", "post_diag", "prediag", "sora")
    _, layer = adapted(*PRESETS[method])
    lora = layer_as_lora(layer, "default")
    assert (lora.weight is not None) == folds
    assert lora.bias is None
    if folds:
        ratio = lora.weight / layer.get_base_layer().weight.detach().double()
        assert (ratio - ratio[:, :1]).abs().max() < 1e-9 and (ratio[:, 0] - 1).abs().max() > 0.01


def test_a_conditioned_bias_is_folded_as_well():
    _, layer = adapted("diagonal", "rotation", condition_bias=True, rotation_scale="reference")
    p = wide(layer)
    b0 = layer.get_base_layer().bias.detach().double()
    expected = ((1 + p["pre_delta"]) * b0) @ rotation(p["post_C"], p["post_E"], "taylor", "reference")
    assert (layer_as_lora(layer, "default").bias - expected).abs().max() < 1e-12
    for options in ({"condition_bias": True, "base": nn.Linear(IN, OUT, bias=False)}, {"condition_bias": False}):
        assert layer_as_lora(adapted("diagonal", "rotation", **options)[1], "default").bias is None
    assert layer_as_lora(adapted("none", "none", condition_bias=True)[1], "default").bias is None


def test_a_weight_that_is_stored_the_other_way_round():
    _, layer = adapted("diagonal", "rotation", base=Conv1D(OUT, IN))
    lora = layer_as_lora(layer, "default")
    w0 = layer.get_base_layer().weight.detach().double().T
    expected = dense_weight(w0, "diagonal", "rotation", wide(layer), 6 / R, kind="taylor")
    assert (lora.weight + lora.b @ lora.a - expected).abs().max() < 1e-12


KINDS = {
    "linear": (nn.Linear(IN, OUT), (50, IN)),
    "linear without a bias": (nn.Linear(IN, OUT, bias=False), (50, IN)),
    "GPT-2's linear": (Conv1D(OUT, IN), (50, IN)),
    "embedding": (nn.Embedding(30, OUT, padding_idx=0), (50,)),
    "convolution": (nn.Conv1d(4, OUT, 3, stride=2, padding=1), (5, 4, 11)),
    "convolution in two dimensions": (nn.Conv2d(4, OUT, (3, 2)), (5, 4, 7, 7)),
    "convolution in three dimensions": (nn.Conv3d(2, OUT, 2), (3, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PRESETS)
def test_peft_s_lora_gives_the_same_output(method, kind):
    base, shape = KINDS[kind]
    model, layer = adapted(*PRESETS[method], base=copy.deepcopy(base), use_rslora=True)
    lora = layer_as_lora(layer, "default")
    x = torch.randint(30, shape) if kind == "embedding" else torch.randn(shape)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        if lora.weight is not None:
            plain.weight.copy_(layer._as_stored(lora.weight))
        rank = len(lora.a)
        other = get_peft_model(nn.Sequential(plain), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
        tensors = {f"base_model.model.0.{name}": tensor for name, tensor in lora_tensors(layer, lora).items()}
        result = set_peft_model_state_dict(other, tensors)
        assert not result.unexpected_keys and not any("lora" in name for name in result.missing_keys)
        assert (other(x) - model(x)).abs().max() < 1e-5
        assert (other(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_a_convolution_that_peft_s_lora_does_not_know_is_refused(options):
    _, layer = adapted("none", "none", base=nn.Conv1d(4, OUT, 3, **options))
    with pytest.raises(ValueError, match="no LoRA of PEFT's equals its adapter"):
        lora_tensors(layer, layer_as_lora(layer, "default"))
