"""Quantised base layers of bitsandbytes, on the CPU: the adapter conditions what the layer computes, unread."""

import pytest
import torch
from dense import transformed
from dense import weight as dense_weight
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
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


def values(conditioned):
    """The dense weight that the packed one stands for, in float64."""
    return conditioned.get_base_weight().double()


def stored_bytes(conditioned):
    """Four bits packed into floats may be any float, not a number among them."""
    return conditioned.get_base_layer().weight.detach().clone().view(torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", PRESETS)
def test_merging_writes_the_dense_weight_quantised_anew_and_unmerging_restores_every_bit(method, bits):
    model = adapted(method, bits)
    conditioned = model.base_model.model[0]
    if bits == 8:
        model.eval()(torch.randn(2, IN))  # which moves its values from the weight to its state
    p = {name: value.detach().double() for name, value in conditioned.adapter_parameters("default").items()}
    wanted = dense_weight(values(conditioned), *PRESETS[method], p, 4.0, kind="taylor")
    packed, unmerged = stored_bytes(conditioned), model.eval()(torch.ones(1, IN).requires_grad_())

    model.merge_adapter()
    step = wanted.abs().amax() / (100 if bits == 8 else 6)  # the widest gap between the values of the format
    assert (values(conditioned) - wanted).abs().max() < step
    assert (values(conditioned) - wanted).abs().mean() < step / 4
    model.merge_adapter()  # nothing more
    model.unmerge_adapter()
    model.to("cpu")  # which quantises what is not marked as quantised
    assert torch.equal(stored_bytes(conditioned), packed)
    assert torch.equal(model(torch.ones(1, IN).requires_grad_()), unmerged)


@pytest.mark.parametrize("bits", BITS)
def test_a_magnitude_reads_the_dense_weight(bits):
    model = adapted("dora", bits)
    conditioned = model.base_model.model[0]
    base, p = conditioned.get_base_layer(), conditioned.adapter_parameters("default")
    x = torch.randn(20, IN, requires_grad=True)
    w = values(conditioned) + 4.0 * (p["B"] @ p["A"]).double()
    rows = (base(x) - base.bias) + 4.0 * (x @ p["A"].T) @ p["B"].T
    expected = rows * (p["magnitude"] / torch.linalg.norm(w, dim=1)) + base.bias
    assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("bits", [4, "4 in floats"])
def test_a_weight_laid_out_anew_for_the_processor_is_not_merged(bits):
    model = adapted("sora", bits)
    base = model.base_model.model[0].get_base_layer()
    with torch.no_grad():
        model.eval()(torch.randn(2, IN))
    if not getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor does not lay 4-bit weights out anew")
    with pytest.raises(ValueError, match="merging needs the values of the base weight"):
        model.merge_adapter()


class Packed(nn.Module):
    """As a layer of GPTQ: it computes, its weight is nowhere to be read, and it is no `torch.nn.Linear`."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.randint(-7, 8, (IN, OUT), dtype=torch.int32))
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)

    def forward(self, x):
        return x @ (self.qweight / 64) + self.bias


def test_a_layer_that_is_no_linear_and_has_no_weight_trains_and_is_not_merged(monkeypatch):
    for module in ("layer", "model"):
        backend = lambda base, **_: ForwardOnlyQuantizationBackend("gptq") if isinstance(base, Packed) else None  # noqa: E731
        monkeypatch.setattr(f"sora_hw.adapter.{module}.resolve_quantization_backend", backend)
    for method in METHODS:
        torch.manual_seed(0)
        config = sora_hw.ConditionedConfig(method=method, dropout=0.0, init_weights=False, target_modules=["0"])
        model = get_peft_model(nn.Sequential(Packed()), config)
        layer = model.base_model.model[0]
        p, base = layer.adapter_parameters("default"), layer.get_base_layer()
        x = torch.randn(20, IN)
        weight = dense_weight((base.qweight / 64).t(), *PRESETS[method], p, 2.0, kind="taylor")
        expected = x @ weight.t() + base.bias
        y = model(x)
        assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
        y.sum().backward()
        assert all(value.grad is not None for value in p.values())
        with pytest.raises(ValueError, match="merging needs the values of the base weight, which a gptq layer"):
            model.merge_adapter()
        assert model.unload()[0] is base
    config = sora_hw.ConditionedConfig(method="dora", target_modules=["0"])
    with pytest.raises(ValueError, match=r"a magnitude .* needs the values of the base weight, which a gptq layer"):
        get_peft_model(nn.Sequential(Packed()), config)
