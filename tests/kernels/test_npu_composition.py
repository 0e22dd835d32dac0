"""The NPU's composition of vendor operators, called on CPU tensors, against float64: values, layouts, temporaries."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from sora_hw_kernels.npu import composition
from torch.utils._python_dispatch import TorchDispatchMode

# dtype -> bound relative to the largest entry: half a unit in the last place and float32 sums in another order
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SHAPES = [(70, 300, 18), (1, 1, 1), (33, 64, 100), (0, 5, 2)]
OPTIONS = list(itertools.product([True, False], repeat=2))


def fused_matmul(x1, x2, *, bias=None, x3=None, fused_op_type=""):
    """`npu_fused_matmul` by its formula, for the one epilogue that is used: the sum in float32, rounded once."""
    assert fused_op_type == "add" and bias is None and x1.dtype == x2.dtype == x3.dtype
    return (x1.float() @ x2.float() + x3.float()).to(x1.dtype)


@pytest.fixture
def fused(monkeypatch):
    """An NPU that has the fused product: a list of its calls."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(args)
        return fused_matmul(*args, **kwargs)

    monkeypatch.setattr(composition, "has_fused_matmul", lambda: True)
    monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(npu_fused_matmul=recorded), raising=False)
    return calls


def inputs(dtype, n, out, r, scale=True, bias=True, strided=False, b_dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    base, z = normal(n, out), normal(n, r)
    if strided:
        base, z = normal(n, out + 7)[:, 3 : 3 + out], normal(r, n).t()
    c = 0.5 + torch.rand(out, generator=g) if scale else None
    return base, c, z, 0.3 * normal(out, r, dtype=b_dtype), normal(out, dtype=torch.float32) if bias else None


def double(*tensors):
    return (None if t is None else t.double() for t in tensors)


def close(actual, reference, dtype, factor=1):
    assert actual.shape == reference.shape
    bound = factor * TOLERANCE[dtype] * (reference.abs().max() if reference.numel() else 0)
    assert ((actual.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("scale", "bias"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward(dtype, shape, scale, bias, strided, b_dtype):
    args = inputs(dtype, *shape, scale, bias, strided, b_dtype)
    kept = args[0].clone()
    y = composition.forward(*args)
    base, c, z, b, bias_ = double(*args)
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(args[0], kept)
    terms = [base * (1 if c is None else c), z @ b.T, 0 if bias_ is None else bias_]
    # Rounded once, each element: neither a factor nor the product was rounded on the way.
    size = terms[0].abs() + z.abs() @ b.T.abs() + abs(terms[2])
    bound = sum(terms).abs() * torch.finfo(dtype).eps / 2 + size * TOLERANCE[torch.float32]
    assert y.shape == base.shape and ((y.double() - sum(terms)).abs() <= bound).all()


@pytest.mark.parametrize("saved_base", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("scale", "bias"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_backward(dtype, shape, scale, bias, strided, saved_base):
    grad, c, z, b, bias_ = inputs(dtype, *shape, scale, bias, strided)
    base = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(dtype)
    saved = base if saved_base else composition.forward(base, c, z, b, bias_)
    kept = saved.clone()
    dbase, dz, db, dc, dbias = composition.backward(grad, saved, c, z, b, bias_, saved_base, True)

    g, s, c64, z64, b64, bias64 = double(grad, saved, c, z, b, bias_)
    assert torch.equal(saved, kept) and dz.stride() == z.stride() and dz.dtype == dtype and db.dtype == b.dtype
    close(dz, g @ b64, dtype)
    close(db, g.T @ z64, dtype)
    if bias:
        close(dbias, g.sum(0), torch.float32)
    if scale:
        close(dbase, g * c64, dtype)
        products = (g * (s if saved_base or bias64 is None else s - bias64)).sum(0)
        close(dc, products if saved_base else (products - (b64 * (g.T @ z64)).sum(1)) / c64, dtype, factor=5)
    else:
        assert dbase.numel() == dc.numel() == 0


@pytest.mark.parametrize("scale", [True, False])
def test_only_the_gradients_asked_for(scale):
    grad, c, z, b, _ = inputs(torch.float32, 70, 300, 18, scale, False)
    wanted = composition.backward(grad, grad, c, z, b, None, True, True)
    without = composition.backward(grad, grad, c, z, b, None, True, False)
    assert without[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(wanted[1:], without[1:], strict=True))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_input_gradient(dtype, shape, masked, fused):
    n, features, r = shape
    grad, _, dz, a, _ = inputs(dtype, n, features, r, strided=True)
    a = a.t().to(dtype)
    mask = torch.rand(n, features) > 0.25 if masked else None
    reference = dz.double() @ a.double()
    reference = grad.double() + (reference * mask * (4 / 3) if masked else reference)
    close(composition.input_gradient(grad, dz, a, mask, 4 / 3), reference, dtype, factor=2)
    # It has no mask, and multiplies float32 only in HF32.
    assert len(fused) == (not masked and dtype != torch.float32)


def test_input_gradient_without_the_fused_product(monkeypatch):
    monkeypatch.setattr(composition, "has_fused_matmul", lambda: False)
    grad, _, dz, a, _ = inputs(torch.bfloat16, 70, 300, 18)
    a = a.t().bfloat16()
    close(composition.input_gradient(grad, dz, a, None, 1.0), grad.double() + dz.double() @ a.double(), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "has"),
    [("Ascend910B3", False), ("Ascend910_9392", False), ("Ascend910_9589", True), ("Ascend950PR_9599", True)],
)
def test_only_the_950_has_the_fused_product(monkeypatch, name, has):
    monkeypatch.setattr(torch, "npu", SimpleNamespace(get_device_name=lambda: name), raising=False)
    composition.has_fused_matmul.cache_clear()
    assert composition.has_fused_matmul() is has
    composition.has_fused_matmul.cache_clear()


class Temporaries(TorchDispatchMode):
    """Counts the float32 tensors of (N, out) that are made, and not the views of one."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made = shape, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape and result.dtype == torch.float32:
            self.made[result.untyped_storage().data_ptr()] = result  # kept, so that no address is given out again
        return result


@pytest.mark.parametrize(("scale", "bias"), OPTIONS)
def test_one_temporary_of_the_size_of_the_rows(scale, bias):
    args = inputs(torch.bfloat16, 40, 50, 3, scale, bias)
    with Temporaries(args[0].shape) as forward:
        composition.forward(*args)
    with Temporaries(args[0].shape) as backward:
        composition.backward(args[0], args[0], *args[1:], False, True)
    assert len(forward.made) == 1
    assert len(backward.made) == scale
