"""The CUDA kernels and the whole path on a GPU: values, gradients, determinism, compile, graphs, quantised bases."""

import copy
import itertools
from typing import get_args

import pytest
import torch
from dense import taylor_coefficients
from peft import get_peft_model
from torch import nn

import sora_hw
from sora_hw import ops
from sora_hw.conditioning import PRESETS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# dtype -> bound relative to the largest entry; float32 by three TF32 products
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# (N, out, R): whole tiles; ragged; one element; the ranks around every tile; several programs over the rows
SHAPES = [(256, 512, 16), (70, 300, 18), (1, 1, 1), (4096, 1024, 24), (513, 257, 32), (300, 640, 33), (129, 96, 200)]
KEEP = get_args(ops.Keep)


def inputs(dtype, n, out, r, scale=True, bias=True, strided=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)

    base, z = normal(n, out), normal(n, r)
    if strided:
        base, z = normal(n, 2 * out)[:, :out], normal(r, n).t()
    c = (0.5 + torch.rand(out, generator=g)).to(DEVICE) if scale else None
    b, b0 = 0.3 * normal(out, r, dtype=torch.float32), normal(out, dtype=torch.float32) if bias else None
    return [None if t is None else t.requires_grad_() for t in (base, c, z, b, b0)]


def close(actual, reference, dtype, factor=1):
    bound = factor * TOLERANCE[dtype] * reference.abs().max().clamp(min=1e-30)
    assert (actual.double() - reference).abs().max() <= bound


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(("scale", "bias"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_against_float64(dtype, shape, scale, bias, keep, strided):
    args = inputs(dtype, *shape, scale, bias, strided)
    y = ops.scale_rank_update(*args, keep=keep)
    base, c, z, b, b0 = (None if t is None else t.detach().double().requires_grad_() for t in args)
    reference = base * (1 if c is None else c) + z @ b.T + (0 if b0 is None else b0)
    close(y, reference.detach(), dtype)
    dy = torch.randn_like(reference).to(dtype)
    given, leaves = ([t for t in ts if t is not None] for ts in (args, (base, c, z, b, b0)))
    pairs = zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(reference, leaves, dy.double()), strict=True)
    for leaf, (actual, wanted) in zip(given, pairs, strict=True):
        close(actual, wanted, dtype, factor=3 if leaf is args[1] and keep != "base" else 1)


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_low_rank_input(dtype, dropout, probed):
    x = torch.randn(3, 200, 600, device=DEVICE).to(dtype).requires_grad_()
    a, q = torch.randn(18, 600, device=DEVICE).requires_grad_(), torch.randn(256, 4, device=DEVICE).requires_grad_()
    weight = torch.randn(256, 600, device=DEVICE).to(dtype)
    value = (q.t().to(dtype) @ weight).detach()
    probe = ops.Probe(q, weight, value) if probed else None
    torch.manual_seed(1)
    through, z = ops.low_rank_input(x, a, 2.0, dropout, probe)
    torch.manual_seed(1)
    mask = torch.native_dropout(torch.ones_like(x), dropout, True)[1].double() / (1 - dropout) if dropout else 1.0
    x64, a64 = x.detach().double().requires_grad_(), a.detach().to(dtype).double().requires_grad_()
    z64 = 2 * (x64 * mask) @ a64.T
    leaves, leaves64 = [x, a], [x64, a64]
    if probed:
        q64 = q.detach().double().requires_grad_()
        read = q64.T @ weight.double()
        z64 = torch.cat([z64, x64 @ (read + (value.double() - read).detach()).T], dim=-1)
        leaves, leaves64 = [*leaves, q], [*leaves64, q64]
    close(z, z64.detach(), dtype, factor=2)
    dx, dz = torch.randn_like(through), torch.randn_like(z)
    actual = torch.autograd.grad((through, z), leaves, (dx, dz))
    wanted = torch.autograd.grad((x64 * 1.0, z64), leaves64, (dx.double(), dz.double()))
    for pair in zip(actual, wanted, strict=True):
        close(*pair, dtype, factor=3 if probed else 2)  # the gradient of `q^T W0` is rounded before it goes on


def coefficients(out, r, rp, scaled):
    g = torch.Generator().manual_seed(0)
    b, c, e = (torch.randn(out, n, generator=g).to(DEVICE) for n in (r, rp, rp))
    return b, c, e, (0.5 + torch.rand(out, generator=g)).to(DEVICE) if scaled else None


def assert_rotated_as_the_formula_says(args, turns_b, rule):
    """Values and gradients, against autograd of the plain formula in float64."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in args]
    exact = [None if t is None else t.double().requires_grad_() for t in args]
    outputs = ops.taylor_rotation(*leaves, turns_b, rule == "bounded", 0.7)
    wanted = taylor_coefficients(*exact, turns_b, rule, 0.7)
    g = torch.Generator().manual_seed(1)
    incoming = [torch.randn(t.shape, generator=g).to(DEVICE) for t in outputs]
    leaves, exact = ([t for t in ts if t is not None] for ts in (leaves, exact))
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    exact_gradients = torch.autograd.grad(wanted, exact, [t.double() for t in incoming])
    for actual, expected in zip((*outputs, *gradients), (*wanted, *exact_gradients), strict=True):
        # Terms of about one may cancel: of one element, all of the gradients of C and E do.
        assert torch.linalg.norm(actual.double() - expected) <= 4e-6 * torch.linalg.norm(expected).clamp(min=1)


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ["bounded", "reference"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "shape", [(4096, 16, 1), (14336, 16, 16), (70, 18, 3), (1, 1, 1), (1024, 64, 16), (300, 100, 2), (200, 150, 1)]
)
def test_the_rotation_against_float64(shape, scaled, rule, turns_b):
    assert_rotated_as_the_formula_says(coefficients(*shape, scaled), turns_b, rule)


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ["bounded", "reference"])
def test_zero_factors_turn_nothing(rule, turns_b):
    b, c, e, scale = coefficients(70, 5, 2, True)
    zero = torch.zeros_like(c)
    for pair in ((zero, e), (c, -c), (zero, zero), (c, zero)):  # C = 0; D = 0; both; D = C
        turned, q = ops.taylor_rotation(b, *pair, scale, turns_b, rule == "bounded", 0.7)
        assert (turned[:, :5] - b).abs().max() < 1e-5 and (q @ turned[:, 5:].t()).abs().max() < 1e-5
        assert_rotated_as_the_formula_says((b, *pair, scale), turns_b, rule)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype):
    base, c, z, b, b0 = inputs(dtype, 70, 300, 18)
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update, (base, c, z, b, b0))
    args = [t.detach() for t in (base, base, c, z, b, b0)]
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update_backward, (*args, False, True))
    grad, dz, a = torch.randn(70, 64), torch.randn(70, 3), torch.randn(3, 64)
    mask = (torch.rand(70, 64) > 0.5).to(DEVICE)
    on = [t.to(DEVICE, dtype) for t in (grad, dz, a)]
    torch.library.opcheck(torch.ops.sora_hw.input_gradient, (*on, mask, 2.0))


@pytest.mark.parametrize("scaled", [True, False])
def test_opcheck_of_the_rotation(scaled):
    args, options = coefficients(70, 18, 3, scaled), (True, True, 0.7)
    torch.library.opcheck(torch.ops.sora_hw.taylor_rotation, (*args, *options))
    turned, q_t, sums = torch.ops.sora_hw.taylor_rotation(*args, *options)
    torch.library.opcheck(torch.ops.sora_hw.taylor_rotation_backward, (turned, q_t, *args, sums, *options))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_hundred_repeats_are_equal_to_the_bit(dtype):
    args = inputs(dtype, 4096, 1024, 24)
    dy = torch.randn(4096, 1024, device=DEVICE).to(dtype)

    def run():
        y = ops.scale_rank_update(*args)
        return [y, *torch.autograd.grad(y, args, dy)]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, f) for a, f in zip(run(), first, strict=True))


def test_more_elements_than_32_bits_count():
    """Offsets beyond 2^31: the last rows are right."""
    rows, features = 2**19 + 5, 4096 + 8
    base = torch.zeros(rows, features, dtype=torch.bfloat16, device=DEVICE)
    base[-3:] = 1.0
    z = torch.zeros(rows, 2, dtype=torch.bfloat16, device=DEVICE)
    z[-3:] = 1.0
    b = torch.full((features, 2), 0.5, device=DEVICE)
    y = ops.scale_rank_update(base, torch.full((features,), 2.0, device=DEVICE), z, b)
    assert (y[-3:] == 3.0).all() and (y[:-3].sum() == 0).item()


def adapted(method, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 256)).to(dtype)
    config = {"r": 8, "dropout": 0.0, "init_weights": False, "target_modules": ["0", "2"], **options}
    return get_peft_model(base, sora_hw.ConditionedConfig(method=method, **config))


def outcome(model, x):
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    # The sum: gradients of the mean would be among the subnormal numbers of float16.
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", PRESETS)
def test_the_layer_against_the_cpu_in_float64(method, dtype):
    exact = adapted(method).double()
    model = copy.deepcopy(exact).to(DEVICE, dtype)
    model.load_state_dict(exact.state_dict())
    x = torch.randn(600, 256)
    wanted = outcome(exact, x.double().requires_grad_())
    actual = outcome(model, x.to(DEVICE, dtype).requires_grad_())
    for a, w in zip(actual, wanted, strict=True):
        assert torch.linalg.norm(a.double().cpu() - w) <= 8 * TOLERANCE[dtype] * torch.linalg.norm(w)


@pytest.mark.parametrize("method", PRESETS)
def test_compiled_whole_and_under_cuda_graphs(method):
    model = adapted(method, torch.bfloat16).to(DEVICE)
    x = torch.randn(600, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    wanted = outcome(model, x)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            actual = [t.clone() for t in outcome(compiled, x)]
        for a, w in zip(actual, wanted, strict=True):
            assert torch.linalg.norm(a.float() - w.float()) <= 2e-2 * torch.linalg.norm(w.float())


@pytest.mark.parametrize("method", PRESETS)
def test_captured_in_a_cuda_graph(method):
    model = adapted(method, torch.bfloat16).to(DEVICE)
    x = torch.randn(600, 256, device=DEVICE, dtype=torch.bfloat16)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(x).sum().backward()
    optimiser.step()  # what the layers learn in the first step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", [method for method in PRESETS if method != "dora"])
def test_quantised_bases(method, bits):
    """Without reading the weight; the quantised layer's own output is the base product."""
    quantised = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    if bits == 4:
        layer = quantised.Linear4bit(256, 320, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = quantised.Linear8bitLt(256, 320, bias=False, has_fp16_weights=False)
    model = get_peft_model(
        nn.Sequential(layer).to(DEVICE),
        sora_hw.ConditionedConfig(method=method, r=8, dropout=0.0, init_weights=False, target_modules=["0"]),
    )
    x = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.float().sum().backward()
    base = model.base_model.model[0].get_base_layer()(x).double()
    adapter = model.base_model.model[0].adapter_parameters("default")
    assert all(torch.isfinite(p.grad).all() for p in adapter.values())
    plain = nn.Sequential(nn.Linear(256, 320, bias=False)).double().to(DEVICE)
    with torch.no_grad():  # the dense weight that the quantised layer stands for
        plain[0].weight.copy_(model.base_model.model[0].get_base_layer()(torch.eye(256).to(x)).t())
    same = get_peft_model(plain, copy.copy(model.peft_config["default"])).double()
    same.base_model.model[0].load_state_dict(
        {name: value for name, value in model.base_model.model[0].state_dict().items() if "conditioned" in name},
        strict=False,
    )
    assert torch.linalg.norm(y.double() - same(x.double())) <= 3e-2 * torch.linalg.norm(base)
