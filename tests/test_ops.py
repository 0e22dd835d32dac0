"""The operators on the CPU: float64 references, `opcheck`, layouts, dtypes, the two ways to the gradient of `scale`."""

import itertools
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch

from sora_hw import ops

# dtype -> bound on the error relative to the largest entry; half a unit in the last place plus float32 sums
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

KEEP = get_args(ops.Keep)


def inputs(dtype=torch.float64, n=70, out=33, r=5, scale=True, bias=True, seed=0, layout="contiguous"):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    base, z = normal(n, out), normal(n, r)
    if layout == "strided":
        base, z = normal(n, 2 * out)[:, :out], normal(r, n).t()
    return (
        base.requires_grad_(),
        (0.5 + torch.rand(out, generator=g, dtype=torch.float64)).to(wide).requires_grad_() if scale else None,
        z.requires_grad_(),
        normal(out, r, dtype=wide).requires_grad_(),
        normal(out, dtype=wide).requires_grad_() if bias else None,
    )


def expected(base, scale, z, b, bias):
    """In float64 from the very values the operator saw."""
    base, scale, z, b, bias = (
        None if t is None else t.detach().double().requires_grad_() for t in (base, scale, z, b, bias)
    )
    y = (base if scale is None else scale * base) + z @ b.T + (0 if bias is None else bias)
    return y, [t for t in (base, scale, z, b, bias) if t is not None]


def close(actual, reference, dtype, factor=1):
    bound = factor * TOLERANCE[dtype] * reference.abs().max().clamp(min=1e-30)
    assert (actual.double() - reference).abs().max() <= bound


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(("scale", "bias"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_against_float64(dtype, scale, bias, keep, layout):
    args = inputs(dtype, scale=scale, bias=bias, layout=layout, n=600, out=300)  # several blocks of rows
    y = ops.scale_rank_update(*args, keep=keep)
    reference, leaves = expected(*args)
    assert y.dtype == dtype
    close(y, reference.detach(), dtype)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    given = [t for t in args if t is not None]
    gradients = zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(reference, leaves, dy.double()), strict=True)
    for leaf, (actual, wanted) in zip(given, gradients, strict=True):
        # Read off the rounded output, the gradient of `scale` carries the rounding of an output some three times as
        # large as the base product it stands for.
        close(actual, wanted, dtype, factor=3 if leaf is args[1] and keep != "base" else 1)


def test_gradcheck():
    for keep in KEEP:
        args = inputs(n=4, out=6, r=2)
        assert torch.autograd.gradcheck(lambda *a, k=keep: ops.scale_rank_update(*a, keep=k), args)
    x, a = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(ops.skinny_product, (x, a))
    assert torch.autograd.gradcheck(lambda x, a: _used_twice(*ops.low_rank_input(x, a, 1.5)), (x, a))
    q, weight = torch.randn(6, 2).double().requires_grad_(), torch.randn(6, 5).double().requires_grad_()

    def probed(x, a, q, weight):
        # The kept value has no graph: its gradient is that of `q` and `weight` all the same.
        return _used_twice(*ops.low_rank_input(x, a, 1.5, 0.0, ops.Probe(q, weight, (q.T @ weight).detach())))

    assert torch.autograd.gradcheck(probed, (x, a, q, weight))


def _used_twice(x, z):
    return torch.sin(x), z.square()


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_low_rank_input_against_dropout_and_a_product_in_float64(dtype, dropout, scaling):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 60, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    a = torch.randn(7, 60, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    a.requires_grad_()
    torch.manual_seed(1)
    through, z = ops.low_rank_input(x, a, scaling, dropout)
    torch.manual_seed(1)
    mask = torch.nn.functional.dropout(torch.ones_like(x), dropout).detach().bool().double() / max(1e-9, 1 - dropout)
    x64, a64 = x.detach().double().requires_grad_(), a.detach().double().requires_grad_()
    z64 = (x64 * mask) @ _rounded(scaling * a64, dtype).T
    assert torch.equal(through, x) and z.dtype == dtype
    close(z, z64.detach(), dtype, factor=2 if dropout else 1)  # the dropped input is rounded as well
    dx, dz = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in (through, z))
    actual = torch.autograd.grad((through, z), (x, a), (dx, dz))
    wanted = torch.autograd.grad((x64 * 1.0, z64), (x64, a64), (dx.double(), dz.double()))
    close(actual[0], wanted[0], dtype, factor=2)
    close(actual[1], wanted[1], dtype, factor=2)


def _rounded(t, dtype):
    """`t` rounded to a dtype, with the gradient of `t` itself."""
    return t + (t.detach().to(dtype).double() - t.detach())


@pytest.mark.parametrize("trained_weight", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_probe_reads_the_undropped_input_and_passes_gradients_on(dtype, dropout, trained_weight):
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 200, 60, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    a, q = (torch.randn(*s, generator=g, dtype=torch.float64).to(wide).requires_grad_() for s in ((7, 60), (50, 4)))
    weight = torch.randn(50, 60, generator=g, dtype=torch.float64).to(dtype).requires_grad_(trained_weight)
    value = (q.detach().t().to(dtype) @ weight.detach()).detach()
    torch.manual_seed(1)
    through, z = ops.low_rank_input(x, a, 2.5, dropout, ops.Probe(q, weight, value))
    torch.manual_seed(1)
    mask = torch.nn.functional.dropout(torch.ones_like(x), dropout).detach().bool().double() / (1 - dropout)
    x64, a64, q64, weight64 = (t.detach().double().requires_grad_() for t in (x, a, q, weight))
    read = _rounded(q64.T @ weight64, dtype)
    z64 = torch.cat([(x64 * mask) @ _rounded(2.5 * a64, dtype).T, x64 @ read.T], dim=-1)
    assert torch.equal(through, x) and z.dtype == dtype
    close(z, z64.detach(), dtype, factor=2)
    dx, dz = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in (through, z))
    leaves, leaves64 = (x, a, q), (x64, a64, q64)
    if trained_weight:
        leaves, leaves64 = (*leaves, weight), (*leaves64, weight64)
    actual = torch.autograd.grad((through, z), leaves, (dx, dz))
    wanted = torch.autograd.grad((x64 * 1.0, z64), leaves64, (dx.double(), dz.double()))
    for leaf, pair in zip(leaves, zip(actual, wanted, strict=True), strict=True):
        assert pair[0].dtype == leaf.dtype and pair[0].shape == leaf.shape
        close(*pair, dtype, factor=3)  # the gradient of `q^T W0` is rounded before it goes on


def test_the_low_rank_input_where_one_side_has_no_gradient():
    x, a = torch.randn(5, 6), torch.randn(2, 6).requires_grad_()
    through, z = ops.low_rank_input(x, a)
    assert not through.requires_grad, "the frozen layer would compute a gradient that nobody asks for"
    assert torch.allclose(torch.autograd.grad(z.sum(), a)[0], x.sum(0).expand(2, 6))
    x.requires_grad_()
    through, z = ops.low_rank_input(x, a)
    assert torch.equal(torch.autograd.grad(through.sum(), x)[0], torch.ones_like(x))
    through, z = ops.low_rank_input(x, a)
    assert torch.allclose(torch.autograd.grad(z.sum(), x)[0], a.detach().sum(0).expand(5, 6))
    q, weight = torch.randn(9, 3).requires_grad_(), torch.randn(9, 6)
    probe = ops.Probe(q, weight, (q.T @ weight).detach())
    _, z = ops.low_rank_input(x.detach(), a.detach(), 1.0, 0.0, probe)
    assert torch.allclose(torch.autograd.grad(z[:, 2:].sum(), q)[0], (weight @ x.detach().sum(0))[:, None].expand(9, 3))
    with torch.no_grad():
        through, z = ops.low_rank_input(x, a, 1.0, 0.0, probe)
    assert torch.equal(through, x) and not z.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, False)])
def test_opcheck(dtype, scale, bias):
    base, *others = [None if t is None else t.detach() for t in inputs(dtype, scale=scale, bias=bias)]
    torch.library.opcheck(torch.ops.sora_hw.scale_rank_update, (base, *others))
    for saved_base, need_base in itertools.product([True, False], repeat=2):
        args = (base, base, *others, saved_base, need_base)
        torch.library.opcheck(torch.ops.sora_hw.scale_rank_update_backward, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_the_dropout(dtype):
    """But for values, which are drawn anew in every call."""
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for x in (torch.randn(7, 16, dtype=dtype), torch.randn(16, 7, dtype=dtype).t()):
        torch.library.opcheck(torch.ops.sora_hw.dropout, (x, 0.3), test_utils=utilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_the_input_gradient_and_the_norm(dtype):
    a = torch.randn(3, 16, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    grad, dz = torch.randn(7, 16, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    for mask in (None, torch.rand(7, 16) > 0.5):
        torch.library.opcheck(torch.ops.sora_hw.input_gradient, (grad, dz, a, mask, 2.0))
    weight, b = torch.randn(9, 16, dtype=dtype), torch.randn(9, 3, dtype=wide)
    norm_squared = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    for c in (None, torch.rand(9, dtype=wide)):
        torch.library.opcheck(torch.ops.sora_hw.factored_row_norm, (weight, norm_squared, c, b, a.to(wide)))


def test_gradients_of_gradients_are_refused():
    base, c, z, b, bias = inputs(torch.float64)
    x, a = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2, 6)))
    factor = torch.randn(33, 2, dtype=torch.float64, requires_grad=True)
    for y, leaf in (
        (ops.scale_rank_update(base, c, z, b, bias), base),
        (ops.skinny_product(x, a), x),
        (ops.low_rank_input(x, a)[1], x),
        (ops.taylor_rotation(b, factor, factor, c, True, True, 1.0)[0], factor),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_no_rows_give_no_rows_and_zero_gradients():
    args = inputs(n=0)
    y = ops.scale_rank_update(*args)
    assert y.shape == (0, 33)
    for gradient in torch.autograd.grad(y.sum(), args):
        assert not gradient.any()


def test_leading_dimensions_are_kept():
    base, scale, z, b, bias = inputs(n=12)
    flat = ops.scale_rank_update(base, scale, z, b, bias)
    deep = ops.scale_rank_update(base.view(2, 3, 2, -1), scale, z.view(2, 3, 2, -1), b, bias)
    assert torch.equal(deep.view(12, -1), flat)
    x, a = torch.randn(2, 3, 4, 8), torch.randn(5, 8)
    assert torch.allclose(ops.skinny_product(x, a), x @ a.T, atol=1e-6)


def test_only_the_gradients_asked_for_are_computed():
    base, scale, z, b, bias = inputs()
    y = ops.scale_rank_update(base.detach(), scale, z, b.detach(), bias)
    reference, _ = expected(base, scale, z, b, bias)
    y.sum().backward()
    assert base.grad is None and b.grad is None
    assert torch.allclose(scale.grad, base.detach().sum(0))
    assert torch.allclose(y, reference.detach())


def test_keeping_the_base_is_exact_where_reading_it_off_the_output_is_not():
    """The reason for `keep`: an entry of `scale` at zero leaves nothing of the base product in the output."""
    base, scale, z, b, bias = inputs()
    with torch.no_grad():
        scale[3] = 0
    dy = torch.ones_like(base)
    (kept,) = torch.autograd.grad(ops.scale_rank_update(base, scale, z, b, bias, keep="base"), scale, dy)
    assert torch.allclose(kept, base.detach().sum(0))
    (read,) = torch.autograd.grad(ops.scale_rank_update(base, scale, z, b, bias), scale, dy)
    assert not torch.isfinite(read[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_that_is_written_into(dtype):
    """Kept itself, autograd refuses; computed again, the gradients are those of the kept one to the bit."""
    args = list(inputs(dtype, n=600, out=300))
    dy = torch.randn(600, 300).to(dtype)
    wanted = torch.autograd.grad(ops.scale_rank_update(*args), args, dy)
    y = ops.scale_rank_update(*args, keep="inputs")
    y += 1
    assert all(torch.equal(a, w) for a, w in zip(torch.autograd.grad(y, args, dy), wanted, strict=True))
    y = ops.scale_rank_update(*args)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, args, dy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_factored_norm_is_the_norm_of_the_dense_sum(dtype, scaled):
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(50, 80, generator=g, dtype=torch.float64).to(dtype)
    b, a = (0.1 * torch.randn(*s, generator=g, dtype=torch.float64).to(wide) for s in ((50, 4), (4, 80)))
    c = torch.rand(50, generator=g, dtype=torch.float64).to(wide) if scaled else None
    norm_squared = weight.double().square().sum(1).to(wide)
    actual = ops.factored_row_norm(weight, norm_squared, c, b, a)
    dense = weight.double() * (1 if c is None else c.double()[:, None]) + b.double() @ a.double()
    error = (actual.double() / torch.linalg.norm(dense, dim=1) - 1).abs().max()
    assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]


def test_a_vanishing_row_has_norm_zero_and_no_nan():
    a = torch.linalg.qr(torch.randn(20, 4))[0].T
    b = torch.randn(6, 4)
    weight = -(b @ a)
    norm = ops.factored_row_norm(weight, weight.square().sum(1), None, b, a)
    assert torch.isfinite(norm).all() and norm.max() < 1e-2


def test_the_kernel_packages_are_found_by_entry_point():
    package = ops.serving("cpu")
    assert package is not None and package.module == "sora_hw_kernels.reference" and package.error is None
    assert ops.serving("xpu") is None


def test_the_fallback_serves_every_device_only_when_asked_for():
    """Read from the dispatcher: no other device is needed to see whether one would be served."""
    program = (
        "import torch, sora_hw; print(torch._C._dispatch_has_computed_kernel_for_dispatch_key("
        "'sora_hw::scale_rank_update_backward', 'XPU'))"
    )
    for value, served in (("1", "True"), ("0", "False")):
        environment = os.environ | {"SORA_HW_FALLBACK": value}
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == served, result.stderr
        assert ("SORA_HW_FALLBACK=1" in result.stderr) == (value == "1")
