"""Quantised base layers of bitsandbytes, on the CPU: the adapter conditions what the layer computes, unread."""

import pytest
import torch
from dense import transformed
from peft import get_peft_model
from torch import nn

import sora_hw
from sora_hw.conditioning import PRESETS

quantised = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
METHODS = [method for method, (_, post) in PRESETS.items() if post != "magnitude"]
IN, OUT = 64, 96


# 8 bits; 4 bits; 4 bits packed into floats, as QLoRA under ZeRO-3 and FSDP wants them
BITS = [8, 4, "4 in floats"]


def layer(bits):
    torch.manual_seed(0)
    if bits != 8:
        storage = torch.uint8 if bits == 4 else torch.bfloat16
        made = quantised.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
    else:
        made = quantised.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    return made.to("cpu")  # where it is quantised


def adapted(method, bits):
    config = sora_hw.ConditionedConfig(method=method, r=8, dropout=0.0, init_weights=False, target_modules=["0"])
    return get_peft_model(nn.Sequential(layer(bits)), config)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_the_map_of_the_base_layers_own_output(method, bits):
    model = adapted(method, bits)
    conditioned = model.base_model.model[0]
    assert conditioned.get_base_layer().weight.numel() < IN * OUT or bits == 8
    p = conditioned.adapter_parameters("default")
    x = torch.randn(20, IN)
    y = model(x)

    base = conditioned.get_base_layer()
    pre, post = PRESETS[method]
    turning = {"kind": "taylor"}
    h = (base(x) - base.bias).detach().float()
    rows = transformed(h, "pre", pre, p, **turning) + 4.0 * (x @ p["A"].T) @ p["B"].T
    expected = transformed(rows, "post", post, p, **turning) + base.bias
    scale = expected.abs().max()
    assert (y - expected).abs().max() <= 1e-5 * scale
    dy = torch.randn_like(y)
    gradients = zip(*(torch.autograd.grad(out, list(p.values()), dy) for out in (y, expected)), strict=True)
    for actual, wanted in gradients:
        assert (actual - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_what_a_quantised_weight_does_not_allow_is_refused(bits):
    with pytest.raises(ValueError, match="merging into a quantised base layer is not supported"):
        adapted("sora", bits).merge_adapter()
    with pytest.raises(ValueError, match="a magnitude needs the norm of the base weight"):
        adapted("dora", bits)
