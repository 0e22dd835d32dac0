"""The Triton kernels of CUDA or of the NPU in Triton's interpreter, on CPU tensors, against float64.

Run by test_cuda_interpreter.py and by ascend/test_interpreter.py, which say in SORA_HW_INTERPRETED whose calls to make.
In float32 and float16: operands of `tl.dot` in bfloat16 are silently wrong there (Triton 3.6 and 3.7), so bfloat16 is
for the GPU, except in the forward kernel, which multiplies in float32. The interpreter rounds to bfloat16 towards zero.
"""

import os

import pytest
import torch
from dense import taylor_coefficients

if os.environ["SORA_HW_INTERPRETED"] == "npu":
    from sora_hw_kernels.npu import launch, verifier
    from sora_hw_kernels.reference import rotation  # what serves the NPU as well

    scale_rank = row_norm = verifier
    DB_IS_ROUNDED = True  # the gradient of `b` is the vendor's product, rounded as the rows are

    @pytest.fixture(autouse=True)
    def few_cores(monkeypatch):
        """Neither a driver nor cores are here: the interpreter takes the place of three, which share the tiles."""
        monkeypatch.setattr(launch, "missing", lambda: None)
        monkeypatch.setattr(launch, "ai_cores", lambda device: 3)
        assert verifier.serving(torch.ones(1, 1)).__name__ == "sora_hw_kernels.npu.scale_rank"
else:
    from sora_hw_kernels.cuda import rotation, row_norm, scale_rank

    DB_IS_ROUNDED = False

    @pytest.fixture(autouse=True)
    def vendor_s_product(monkeypatch):
        """A processor's has no form with half operands and a float32 result."""
        monkeypatch.setattr(scale_rank, "float32_product", lambda a, b: a.float() @ b.float())

    @pytest.fixture(autouse=True)
    def few_programs(monkeypatch):
        """So few that a program has several tiles of rows to walk through, as on a card that is full."""
        monkeypatch.setattr(scale_rank, "FORWARD_PROGRAMS", 4)
        monkeypatch.setattr(scale_rank, "BACKWARD_PROGRAMS", 4)


# New memory is filled with NaN then: what no program writes, and is read all the same, shows.
torch.use_deterministic_algorithms(True)

# dtype -> bound relative to the largest entry: half a unit in the last place and float32 sums in another order
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
# (N, out, R): whole tiles; ragged in all three; one element; several chunks of rows; R of every tile, and above
MANY_ROWS = pytest.param((2100, 130, 5), id="many-rows")
SHAPES = [(64, 256, 16), (70, 300, 18), (1, 1, 1), (3, 1024, 48), MANY_ROWS, (33, 129, 100), (40, 65, 150)]

# scale, bias, strided rows
OPTIONS = [(True, True, False), (True, False, True), (False, True, False), (False, False, True)]


def inputs(dtype, n, out, r, scale, bias, strided, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    base, z = normal(n, out), normal(n, r)
    if strided:
        base, z = normal(n, out + 7)[:, 3 : 3 + out], normal(r, n).t()
    c = (0.5 + torch.rand(out, generator=g)) if scale else None
    return base, c, z, 0.3 * normal(out, r, dtype=torch.float32), normal(out, dtype=torch.float32) if bias else None


def close(actual, reference, dtype, factor=1):
    bound = factor * TOLERANCE[dtype] * reference.abs().max().clamp(min=1e-30)
    assert (actual.double() - reference).abs().max() <= bound


def double(*tensors):
    return (None if t is None else t.double() for t in tensors)


@pytest.mark.parametrize(("scale", "bias", "strided"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward(dtype, shape, scale, bias, strided):
    args = inputs(dtype, *shape, scale, bias, strided)
    y = scale_rank.forward(*args)
    base, c, z, b, bias_ = double(*args)
    assert y.dtype == dtype and y.is_contiguous()
    close(y, base * (1 if c is None else c) + z @ b.T + (0 if bias_ is None else bias_), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_input_gradient(dtype, masked, shape):
    n, inputs_, r = shape
    grad, _, dz, a, _ = inputs(dtype, n, inputs_, r, False, False, strided=True)
    a = a.t().contiguous().to(dtype)
    mask = torch.rand(n, inputs_) > 0.25 if masked else None
    dx = scale_rank.input_gradient(grad, dz, a, mask, 4 / 3)
    update = dz.double() @ a.double()
    close(dx, grad.double() + (update * mask * (4 / 3) if masked else update), dtype)


@pytest.mark.parametrize("saved_base", [False, True])
@pytest.mark.parametrize(("scale", "bias", "strided"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward(dtype, shape, scale, bias, saved_base, strided):
    grad, c, z, b, bias_ = inputs(dtype, *shape, scale, bias, strided)
    base = inputs(dtype, *shape, scale, bias, strided, seed=1)[0]
    # The output is given in the rows' dtype, as the forward pass stores it.
    saved = base if saved_base else scale_rank.forward(base, c, z, b, bias_)
    dbase, dz, db, dc, dbias = scale_rank.backward(grad, saved, c, z, b, bias_, saved_base, True)

    g, s, c64, z64, b64, bias64 = double(grad, saved, c, z, b, bias_)
    close(dz, g @ b64, dtype)
    db_dtype = dtype if DB_IS_ROUNDED else torch.float32
    close(db, g.T @ z64, db_dtype)
    assert dz.stride() == z.stride() and dz.dtype == dtype and db.dtype == torch.float32
    if bias:
        close(dbias, g.sum(0), torch.float32)
    if scale:
        close(dbase, g * c64, dtype)
        products = (g * (s if saved_base or bias64 is None else s - bias64)).sum(0)
        close(dc, products if saved_base else (products - (b64 * (g.T @ z64)).sum(1)) / c64, db_dtype, factor=5)
    else:
        assert dbase.numel() == dc.numel() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [True, False])
def test_backward_without_the_gradient_of_the_base(shape, scale):
    grad, c, z, b, _ = inputs(torch.float32, *shape, scale, False, False)
    with_base = scale_rank.backward(grad, grad, c, z, b, None, True, True)
    without = scale_rank.backward(grad, grad, c, z, b, None, True, False)
    assert without[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(with_base[1:], without[1:], strict=True))


def test_a_gradient_that_autograd_expanded():
    _, c, z, b, _ = inputs(torch.float32, 70, 300, 18, True, False, False)
    grad, saved = torch.ones(()).expand(70, 300), torch.randn(70, 300)
    wanted = scale_rank.backward(grad.contiguous(), saved, c, z, b, None, True, True)
    actual = scale_rank.backward(grad, saved, c, z, b, None, True, True)
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("shape", [(0, 33, 5), (0, 0, 1)])
def test_no_rows(shape):
    args = inputs(torch.float32, *shape, True, True, False)
    assert scale_rank.forward(*args).shape == shape[:2]
    gradients = scale_rank.backward(args[0], args[0], *args[1:], False, True)
    assert [t.shape for t in gradients] == [t.shape for t in (*args[:1], args[2], args[3], args[1], args[4])]
    assert not any(t.any() for t in gradients)


def test_float64_and_half_coefficients_are_left_to_the_composition():
    base, c, z, b, bias = (t.double() for t in inputs(torch.float32, 20, 30, 4, True, True, False))
    y = scale_rank.forward(base, c, z, b, bias)
    assert (y - (base * c + z @ b.T + bias)).abs().max() < 1e-13
    half = scale_rank.forward(base.float(), c.half(), z.float(), b.float(), None)
    assert (half.double() - (base * c.half() + z @ b.T)).abs().max() < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    ("out", "inputs_", "r"), [(64, 256, 16), (50, 300, 18), (1, 1, 1), (33, 70, 100), (9, 40, 150)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_row_norm(dtype, out, inputs_, r, scale, transposed):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs_, generator=g).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    b, a = 0.1 * torch.randn(out, r, generator=g), 0.1 * torch.randn(r, inputs_, generator=g)
    c = torch.rand(out, generator=g) if scale else None
    norm = row_norm.factored_row_norm(weight, weight.double().square().sum(1).float(), c, b, a)
    dense = weight.double() * (1 if c is None else c.double()[:, None]) + b.double() @ a.double()
    assert (norm.double() / torch.linalg.norm(dense, dim=1) - 1).abs().max() < (
        2e-6 if dtype == torch.float32 else 1e-3
    )


def test_the_norm_of_a_vanishing_row_is_no_nan():
    a = torch.linalg.qr(torch.randn(20, 4))[0].T
    b = torch.randn(6, 4)
    weight = -(b @ a)
    norm = row_norm.factored_row_norm(weight, weight.square().sum(1), None, b, a)
    assert torch.isfinite(norm).all() and norm.max() < 1e-2


def coefficients(out, r, rp, scaled, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, c, e = (torch.randn(out, n, generator=g) for n in (r, rp, rp))
    return b, c, e, 0.5 + torch.rand(out, generator=g) if scaled else None


def assert_equal_to_the_formula(args, turns_b, rule):
    """Values and gradients, against autograd of the plain formula in float64."""
    options = (turns_b, rule == "bounded", 0.7)
    turned, q_t, sums = rotation.forward(*args, *options)
    g = torch.Generator().manual_seed(1)
    dturned, dq_t = (torch.randn(t.shape, generator=g) for t in (turned, q_t))
    gradients = rotation.backward(dturned, dq_t, *args, sums, *options)
    leaves = [None if t is None else t.double().requires_grad_() for t in args]
    wanted = taylor_coefficients(*leaves, turns_b, rule, 0.7)
    given = [t for t in leaves if t is not None]
    wanted_gradients = torch.autograd.grad(wanted, given, [dturned.double(), dq_t.t().double()])
    for actual, expected in zip(
        (turned, q_t.t(), *gradients), (*wanted, *wanted_gradients), strict=args[3] is not None
    ):
        # Terms of about one may cancel: of one element, all of the gradients of C and E do.
        assert torch.linalg.norm(actual.double() - expected) <= 4e-6 * torch.linalg.norm(expected).clamp(min=1)
    assert args[3] is not None or gradients[3].numel() == 0


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ["bounded", "reference"])
@pytest.mark.parametrize("scaled", [True, False])
# (out, r, rp): whole tiles; ragged; one element; more rows than the sums take at once; R of every tile, and above
@pytest.mark.parametrize(
    "shape",
    [
        *((256, 16, 1), (70, 18, 3), (1, 1, 1), pytest.param((2100, 5, 1), id="many-rows")),
        *((50, 48, 3), (33, 100, 2), (20, 150, 1)),
    ],
)
def test_the_rotation(shape, scaled, rule, turns_b):
    assert_equal_to_the_formula(coefficients(*shape, scaled), turns_b, rule)


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ["bounded", "reference"])
def test_zero_factors_turn_nothing(rule, turns_b):
    b, c, e, scale = coefficients(70, 5, 2, True)
    zero = torch.zeros_like(c)
    for pair in ((zero, e), (c, -c), (zero, zero), (c, zero)):  # C = 0; D = 0; both; D = C
        turned, q_t, _ = rotation.forward(b, *pair, scale, turns_b, rule == "bounded", 1.0)
        assert (turned[:, :5] - b).abs().max() < 1e-5
        assert (q_t.t() @ turned[:, 5:].t()).abs().max() < 1e-5
        assert_equal_to_the_formula((b, *pair, scale), turns_b, rule)
