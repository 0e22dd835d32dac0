"""Every placement pair, named or not, against the dense formulas in float64: forward, gradients, dropout, bias."""

import itertools

import pytest
import torch
from dense import output as dense_output
from dense import weight as dense_weight
from peft import get_peft_model
from torch import nn

import sora_hw
from sora_hw import ops
from sora_hw.conditioning import POST, PRE, PRESETS
from sora_hw.rotation import ROTATIONS

PAIRS = list(itertools.product(PRE, POST))
# with every form of the exponential where there is a rotation
TRIPLES = [(*pair, form) for pair in PAIRS for form in (ROTATIONS if "rotation" in pair else ROTATIONS[:1])]
IN, OUT = 12, 20


def adapted(pre, post, bias=True, seed=0, **options):
    """A PEFT model around one float64 linear layer, at a random point, and the layer itself."""
    torch.manual_seed(seed)
    options = {"r": 3, "alpha": 6, "rotation_rank": 2, "dropout": 0.0, "init_weights": False} | options
    config = sora_hw.ConditionedConfig(pre=pre, post=post, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=bias)).double(), config)
    return model, model.base_model.model[0], config


def rows(*shape):
    return torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)


def reference(layer, config, x, x_dropped):
    kind = {"kind": config.rotation, "rule": config.rotation_scale, "eps": config.rotation_eps}
    p = layer.adapter_parameters("default")
    base = layer.get_base_layer()
    s = config.alpha / config.r
    return dense_output(
        x, x_dropped, base.weight, base.bias, config.pre, config.post, p, s, config.condition_bias, **kind
    ), list(p.values())


def assert_same(layer, config, x, y, x_dropped):
    expected, parameters = reference(layer, config, x, x_dropped)
    assert (y - expected).abs().max() < 1e-12
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *parameters], dy)
    theirs = torch.autograd.grad(expected, [x, *parameters], dy)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert (actual - wanted).abs().max() < 1e-11 * max(1, wanted.abs().max())


@pytest.mark.parametrize("condition_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pre", "post", "rotation"), TRIPLES)
def test_forward_and_gradients(pre, post, rotation, bias, condition_bias):
    model, layer, config = adapted(pre, post, bias, rotation=rotation, condition_bias=condition_bias)
    x = rows(2, 5)
    assert_same(layer, config, x, model(x), x)


@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_dropout_acts_on_the_input_of_the_low_rank_path_only(pre, post):
    model, layer, config = adapted(pre, post, dropout=0.4)
    model.train()
    x = rows(6)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones_like(x), 0.4)  # the same draw on the same shape
    assert 0 < (mask == 0).sum() < mask.numel()
    assert_same(layer, config, x, y, x * mask)


@pytest.mark.parametrize("condition_bias", [False, True])
@pytest.mark.parametrize(("pre", "post"), [pair for pair in PAIRS if "rotation" in pair])
def test_a_weight_that_cannot_be_read_is_not_needed(pre, post, condition_bias, monkeypatch):
    """Sharded and quantised layers: the rotation reads the finished product instead of the weight."""
    model, layer, config = adapted(pre, post, condition_bias=condition_bias, dropout=0.4)
    monkeypatch.setattr(type(layer), "_weight_is_readable", lambda self: False)
    x = rows(6)
    torch.manual_seed(5)
    y = model.train()(x)
    torch.manual_seed(5)
    assert_same(layer, config, x, y, x * nn.functional.dropout(torch.ones_like(x), 0.4))


@pytest.mark.parametrize("n", [1, IN - 1, IN])
@pytest.mark.parametrize("condition_bias", [False, True])
@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_inference_on_few_and_on_many_rows(pre, post, condition_bias, n):
    """Without a gradient a rotation reads the finished product of few rows, and the weight beside many."""
    model, layer, config = adapted(pre, post, condition_bias=condition_bias)
    x = rows(n)
    assert not layer._rotation_reads_output(x)
    model.eval()
    with torch.no_grad():
        assert layer._rotation_reads_output(x) == (n < IN)
        assert (model(x) - reference(layer, config, x, x)[0]).abs().max() < 1e-12
        assert not layer.train()._rotation_reads_output(x)  # as in the forward pass of a checkpointed layer


@pytest.mark.parametrize(("pre", "post"), [pair for pair in PAIRS if "rotation" in pair])
def test_the_reference_scale_rule(pre, post):
    model, layer, config = adapted(pre, post, rotation_scale="reference")
    x = rows(6)
    assert_same(layer, config, x, model(x), x)


@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_gradcheck_with_the_norm_held_constant(pre, post, monkeypatch):
    model, layer, config = adapted(pre, post, rotation="exp")
    x = rows(3)
    if post == "magnitude":
        kind = {"kind": "exp", "rule": "bounded", "eps": 1.0}
        p = {name: value.detach() for name, value in layer.adapter_parameters("default").items()}
        w0 = layer.get_base_layer().weight.detach()
        norm = torch.linalg.norm(dense_weight(w0, pre, "none", p, config.alpha / config.r, **kind), dim=1)
        monkeypatch.setattr(ops, "factored_row_norm", lambda *args: norm)
    parameters = list(layer.adapter_parameters("default").values())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters))


@pytest.mark.parametrize("method", PRESETS)
def test_small_diagonals_still_get_their_gradient(method):
    """`c` at and near zero, where the gradient cannot be read off the output."""
    model, layer, config = adapted(*PRESETS[method])
    with torch.no_grad():
        for name, value in layer.adapter_parameters("default").items():
            if name.endswith("delta"):
                value[:3] = torch.tensor([-1.0, -1.0 + 1e-9, -0.95])
            elif name == "magnitude":
                value[:3] = torch.tensor([0.0, 1e-9, 0.01])
    x = rows(6)
    assert_same(layer, config, x, model(x), x)


@pytest.mark.parametrize(("pre", "post"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_method_starts_as_the_identity(pre, post, dtype):
    model, layer, _ = adapted(pre, post, init_weights=True)
    model.to(dtype)
    x = rows(7).to(dtype)
    base = layer.get_base_layer()(x)
    assert (model(x) - base).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_parameters_are_those_of_the_method_alone(pre, post):
    _, layer, _ = adapted(pre, post)
    names = {"A": (3, IN), "B": (OUT, 3)}
    for place, transformation in (("pre", pre), ("post", post)):
        if transformation == "diagonal":
            names[f"{place}_delta"] = (OUT,)
        if transformation == "rotation":
            names |= {f"{place}_C": (OUT, 2), f"{place}_E": (OUT, 2)}
    if post == "magnitude":
        names["magnitude"] = (OUT,)
    assert {name: tuple(p.shape) for name, p in layer.adapter_parameters("default").items()} == names
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {f"conditioned_{name}.default" for name in names}


def test_rslora_scales_by_the_root_of_the_rank():
    model, layer, _ = adapted("none", "none", use_rslora=True, r=4, alpha=6, bias=False)
    p = layer.adapter_parameters("default")
    x = rows(3)
    expected = x @ (layer.get_base_layer().weight + 3.0 * p["B"] @ p["A"]).T
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_start_values_of_a_and_c():
    """Kaiming-uniform with a = sqrt(5): bounds 1/sqrt(in) for A, and by fan-out 1/sqrt(out) for C; E and B at zero."""
    torch.manual_seed(0)
    config = sora_hw.ConditionedConfig(method="sora", r=64, rotation_rank=32, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(100, 400)), config).base_model.model[0]
    p = layer.adapter_parameters("default")
    assert 0.97 * 0.1 < p["A"].abs().max() <= 0.1
    assert 0.97 * 0.05 < p["post_C"].abs().max() <= 0.05
    for name in ("B", "post_E", "pre_delta"):
        assert not p[name].any()


@pytest.mark.parametrize("method", PRESETS)
def test_one_row_without_a_batch(method):
    model, layer, config = adapted(*PRESETS[method])
    x = rows()
    assert model(x).shape == (OUT,)
    assert_same(layer, config, x, model(x), x)


@pytest.mark.parametrize("pre", PRE)
def test_a_row_of_zeros_has_no_direction_and_stays_zero(pre):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
    with torch.no_grad():
        base[0].weight[3] = 0
    config = sora_hw.ConditionedConfig(pre=pre, post="magnitude", r=3, dropout=0.0, target_modules=["0"])
    model = get_peft_model(base, config)
    x = rows(6)
    y = model(x)
    assert (y - base[0].get_base_layer()(x)).abs().max() < 1e-14
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_norm_of_a_base_weight_that_is_trained_as_well_is_not_kept():
    """As optimisers that work on copies do, the new values are written past autograd."""
    model, layer, config = adapted("none", "magnitude")
    weight = layer.get_base_layer().weight
    weight.requires_grad_()
    x = rows(6)
    model(x)
    weight.data.mul_(3)
    assert_same(layer, config, x, model(x), x)
