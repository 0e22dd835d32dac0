"""Every method on the simulated NPU: values and gradients against the dense formulas on the CPU, and what ran where.

Run by test_simulated_npu.py in a process that has the device.
"""

import itertools

import dense
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch_npu import simulation

import sora_hw
from sora_hw import ops
from sora_hw.conditioning import POST, PRE, PRESETS
from sora_hw.hardware import PROFILES
from sora_hw.recipes import commonsense
from sora_hw.recipes.recipe import EMBEDDED
from sora_hw.training.base_model import find, load_model
from sora_hw.training.objectives import objective_of

NPU = torch.device("npu", 0)
IN, OUT, N = 24, 40, 17
# What opcheck asks of an operator that draws random numbers, whose values differ from call to call.
WITHOUT_VALUES = ("test_schema", "test_autograd_registration", "test_faketensor")
# Rows in float32 and the weight's products in float32, against float64.
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def counted():
    """Nothing of ours may have run by the fallback to the CPU."""
    simulation.reset()
    yield
    assert not [name for name in simulation.counts()["cpu_fallback"] if name.startswith(("sora_hw::", "npu::"))]


def adapted(pre, post, dtype, **options):
    torch.manual_seed(0)
    options = {"r": 3, "alpha": 6, "rotation_rank": 2, "dropout": 0.0, "init_weights": False} | options
    config = sora_hw.ConditionedConfig(pre=pre, post=post, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, dtype=dtype)), config)
    return model.to(NPU), config


def assert_equal_to_the_dense_formula(pre, post, dtype, **options):
    """Forward, and the gradients of the input and of every parameter."""
    model, config = adapted(pre, post, dtype, **options)
    layer = model.base_model.model[0]
    names, parameters = zip(*layer.adapter_parameters("default").items(), strict=True)
    x = torch.randn(N, IN, dtype=dtype).to(NPU).requires_grad_()
    y, dy = model(x), torch.randn(N, OUT, dtype=dtype).to(NPU)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    assert all(t.device == NPU for t in (y, *gradients, *parameters))

    x64, base = x.detach().cpu().double().requires_grad_(), layer.get_base_layer()
    p64 = {name: p.detach().cpu().double().requires_grad_() for name, p in zip(names, parameters, strict=True)}
    kind = {"kind": config.rotation, "rule": config.rotation_scale, "eps": config.rotation_eps}
    weight, bias = (t.detach().cpu().double() for t in (base.weight, base.bias))
    wanted = dense.output(x64, x64, weight, bias, pre, post, p64, config.alpha / config.r, **kind)
    wanted = [wanted, *torch.autograd.grad(wanted, [x64, *p64.values()], dy.cpu().double())]
    for actual, expected in zip((y, *gradients), wanted, strict=True):
        error = torch.linalg.norm(actual.detach().cpu().double() - expected)
        assert error <= CLOSE[dtype] * torch.linalg.norm(expected)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("pre", "post"), list(itertools.product(PRE, POST)))
def test_every_pair_equals_the_dense_formula(pre, post, dtype):
    assert_equal_to_the_dense_formula(pre, post, dtype)
    ran = simulation.counts()["native"]
    for name in ("scale_rank_update", "scale_rank_update_backward", "input_gradient"):
        assert ran[f"sora_hw::{name}"] > 0
    assert ("sora_hw::factored_row_norm" in ran) == (post == "magnitude")
    for name in ("taylor_rotation", "taylor_rotation_backward"):
        assert (f"sora_hw::{name}" in ran) == ("rotation" in (pre, post))


@pytest.mark.parametrize("rotation", ["cayley", "exp"])
def test_every_rotation_equals_the_dense_formula(rotation):
    assert_equal_to_the_dense_formula("diagonal", "rotation", torch.float32, rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", PRESETS)
def test_every_method_trains_with_dropout(method, dtype):
    """Every method goes through its backward pass."""
    model, _ = adapted(*PRESETS[method], dtype, dropout=0.4)
    layer = model.train().base_model.model[0]
    x = torch.randn(5, N, IN, device=NPU, dtype=dtype).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in layer.adapter_parameters("default").values())


@pytest.mark.parametrize("shape", [(17, 24), (3, 5, 24)])
def test_the_low_rank_input_under_the_mask_that_was_drawn(shape):
    x, a = torch.randn(shape, device=NPU).requires_grad_(), torch.randn(4, 24, device=NPU).requires_grad_()
    torch.manual_seed(5)
    through, z = ops.low_rank_input(x, a, dropout=0.4)
    torch.manual_seed(5)
    dropped, mask = torch.ops.sora_hw.dropout(x.detach(), 0.4)
    assert mask.dtype == torch.bool and mask.shape == x.shape and 0.4 < mask.float().mean() < 0.8
    assert torch.allclose(dropped, x.detach() * mask / 0.6) and torch.allclose(z, dropped @ a.T, atol=1e-5)
    dx, dz = torch.randn(shape, device=NPU), torch.randn(*shape[:-1], 4, device=NPU)
    gx, ga = torch.autograd.grad([through, z], [x, a], [dx, dz])
    assert torch.allclose(gx, dx + mask / 0.6 * (dz @ a), atol=1e-5)
    assert torch.allclose(ga, dz.flatten(0, -2).T @ dropped.flatten(0, -2), atol=1e-5)


def test_a_wrong_gradient_is_noticed():
    """The check itself, held against a kernel whose gradient is off by one part in a thousand."""
    library = torch.library.Library("sora_hw", "IMPL")
    right = torch.library.get_kernel("sora_hw::scale_rank_update_backward", "PrivateUse1")

    def wrong(*args):
        dbase, dz, db, dscale, dbias = right.call_boxed(torch._C.DispatchKeySet("PrivateUse1"), *args)
        return dbase, dz * 1.001, db, dscale, dbias

    assert_equal_to_the_dense_formula("diagonal", "rotation", torch.float32)
    library.impl("scale_rank_update_backward", wrong, "PrivateUse1", allow_override=True)
    try:
        with pytest.raises(AssertionError):
            assert_equal_to_the_dense_formula("diagonal", "rotation", torch.float32)
    finally:
        library._destroy()
    assert_equal_to_the_dense_formula("diagonal", "rotation", torch.float32)


@pytest.mark.parametrize("method", PRESETS)
def test_every_parameter_and_activation_of_a_model_is_on_the_npu(method):
    """The embedded model with an adapter, a training step with checkpointing: what goes in and out of every module."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    model = get_peft_model(
        load_model(find(EMBEDDED, objective_of(commonsense.embedded())), PROFILES["cpu"]),
        sora_hw.ConditionedConfig(method=method, **options),
    )
    model.gradient_checkpointing_enable()
    model.to(NPU).train()
    devices = set()

    def note(module, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        devices.update(t.device for t in (*inputs, *outputs) if isinstance(t, torch.Tensor))

    for module in model.modules():
        module.register_forward_hook(note)
    ids = torch.arange(24, device=NPU)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    devices.update(p.device for p in model.parameters())
    devices.update(p.grad.device for p in model.parameters() if p.grad is not None)
    assert devices == {NPU}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    for x in (torch.randn(7, 12, device=NPU, dtype=dtype), torch.randn(12, 7, device=NPU, dtype=dtype).t()):
        torch.library.opcheck(torch.ops.sora_hw.dropout, (x, 0.3), test_utils=WITHOUT_VALUES)
    base, z, b = (torch.randn(shape, device=NPU, dtype=dtype) for shape in ((7, 12), (7, 3), (12, 3)))
    c, bias = torch.rand(12, device=NPU) + 0.5, torch.randn(12, device=NPU)
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update, (base, c, z, b, bias))
    columns = torch.randn(12, 7, device=NPU, dtype=dtype).t()  # another order in memory changes nothing
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update, (columns, c, z, b, bias))
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update, (columns, None, z, b, None))
    torch.library.opcheck(
        torch.ops.sora_hw.scale_rank_update_backward, (base, base, c, z, b.float(), bias, False, True)
    )
    mask = torch.rand(7, 12, device=NPU) > 0.5
    for grad, kept in itertools.product((base, columns), (mask, None)):
        torch.library.opcheck(torch.ops.sora_hw.input_gradient, (grad, z, b.t().contiguous(), kept, 2.0))
    norm_squared = torch.rand(12, device=NPU) + 1
    args = (torch.randn(12, 9, device=NPU, dtype=dtype), norm_squared, c, b.float(), torch.randn(3, 9, device=NPU))
    torch.library.opcheck(torch.ops.sora_hw.factored_row_norm, args)
    factors = [torch.randn(12, n, device=NPU) for n in (3, 2, 2)]
    for scale, options in itertools.product((c, None), ((True, True, 1.0), (False, False, 1.0))):
        torch.library.opcheck(torch.ops.sora_hw.taylor_rotation, (*factors, scale, *options))
        turned, q_t, sums = torch.ops.sora_hw.taylor_rotation(*factors, scale, *options)
        args = (turned, q_t, *factors, scale, sums, *options)
        torch.library.opcheck(torch.ops.sora_hw.taylor_rotation_backward, args)
