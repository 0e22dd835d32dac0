"""Rotations against the dense exponential, the dense Cayley transform, and the paper's Theorem 2."""

import pytest
import torch
from dense import rotation as dense_rotation
from dense import taylor_coefficients
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_hw import ops
from sora_hw.conditioning import Conditioning, linear_map
from sora_hw.rotation import ROTATION_SCALES, ROTATIONS, rotation_factors, rotation_scale


def factors(seed: int, out: int = 40, rp: int = 3, size: float = 1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(size * torch.randn(out, rp, generator=g, dtype=dtype) for _ in range(2))


def dense(u, v):
    return torch.eye(len(u), dtype=u.dtype) + u @ v.T


@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_low_rank_form_is_the_dense_one(kind, rule):
    for seed, size in ((0, 1.0), (1, 0.01), (2, 30.0)):
        c, e = factors(seed, size=size)
        expected = dense_rotation(c, e, kind, rule, 0.7)
        assert torch.allclose(dense(*rotation_factors(c, e, kind, rule, 0.7)), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["cayley", "exp"])
@pytest.mark.parametrize("eps", [1.0, 3.0])
def test_cayley_and_exponential_are_orthogonal_in_float32(kind, eps):
    for seed in range(20):
        p = dense(*rotation_factors(*factors(seed, out=64, rp=4, dtype=torch.float32), kind, "bounded", eps))
        assert (p @ p.T - torch.eye(64)).abs().max() < 1e-6


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.integers(2, 24),
    rp=st.integers(1, 6),
    size=st.floats(1e-4, 1e4),
    eps=st.floats(0.05, 2.0),
)
def test_theorem_2_holds_with_its_tight_constant(seed, out, rp, size, eps):
    """The paper, Theorem 2, tightened: `||exp(s_p J) - (I + s_p J)||_2 <= eps^2 / 8` and `||s_p J||_F <= eps`."""
    c, e = factors(seed, out, rp, size)
    taylor = dense(*rotation_factors(c, e, "taylor", "bounded", eps))
    exact = torch.matrix_exp(taylor - torch.eye(out, dtype=torch.float64))
    assert torch.linalg.matrix_norm(taylor - torch.eye(out, dtype=torch.float64)) <= eps * (1 + 1e-9)
    assert torch.linalg.matrix_norm(exact - taylor, ord=2) <= eps**2 / 8 * (1 + 1e-9)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_factor_gives_the_identity_and_finite_gradients(kind, rule, dtype):
    c, e = factors(3, dtype=dtype)
    zero = torch.zeros_like(c)
    for pair in ((zero, e), (c, -c), (zero, zero), (c, zero)):  # C = 0; D = 0; both; D = C, where J = 0
        c_, e_ = (t.clone().requires_grad_() for t in pair)
        p = dense(*rotation_factors(c_, e_, kind, rule))
        assert (p - torch.eye(len(c), dtype=dtype)).abs().max() < 50 * torch.finfo(dtype).eps
        p.square().sum().backward()
        assert torch.isfinite(c_.grad).all() and torch.isfinite(e_.grad).all()


def test_the_bounded_scale_does_not_depend_on_the_size_of_the_factors():
    c, e = factors(4)
    small = dense(*rotation_factors(c, e))
    assert torch.allclose(dense(*rotation_factors(1e3 * c, 1e3 * e)), small, atol=1e-12)


def test_the_reference_scale_is_at_most_one_and_falls_with_the_norms():
    c, e = factors(5)
    assert rotation_scale(1e-3 * c, 1e-3 * e, "reference", 1.0) == 1.0
    expected = 1 / (torch.linalg.norm(c) + torch.linalg.norm(c + e) + 1e-6)
    assert torch.isclose(rotation_scale(c, e, "reference", 1.0), expected, rtol=1e-12)


@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("kind", ROTATIONS)
def test_gradients_by_finite_differences(kind, rule):
    c, e = (t.requires_grad_() for t in factors(6, out=7, rp=2))
    assert torch.autograd.gradcheck(lambda c, e: dense(*rotation_factors(c, e, kind, rule)), (c, e))


def test_near_the_identity_bfloat16_factors_keep_their_digits():
    """What storing E = D - C is for: the rotation term of bfloat16 factors is right to bfloat16's own precision."""
    c, e = factors(7, out=64, rp=2)
    c, e = c.bfloat16(), (1e-3 * e).bfloat16()
    exact = dense_rotation(c.double(), e.double(), "taylor") - torch.eye(64)
    u, v = rotation_factors(c, e)
    assert torch.linalg.norm((u @ v.T).double() - exact) < 1e-5 * torch.linalg.norm(exact)


# float64, and float32 against float64: sums of a few hundred terms
CLOSE = {torch.float64: 1e-12, torch.float32: 4e-6}


def coefficients(dtype, rp, r=5, scaled=True, out=120, seed=0, size=1.0):
    """Arguments of the operator, as leaves: b, c, e, scale."""
    g = torch.Generator().manual_seed(seed)
    b, c, e = (torch.randn(out, n, generator=g, dtype=torch.float64) for n in (r, rp, rp))
    scale = 0.5 + torch.rand(out, generator=g, dtype=torch.float64) if scaled else None
    return [None if t is None else t.to(dtype).requires_grad_() for t in (b, size * c, size * e, scale)]


def assert_equal_to_the_formula(args, turns_b, rule, eps):
    """Values, and the gradients by autograd of the plain formula, in float64 from the very values the operator saw."""
    outputs = ops.taylor_rotation(*args, turns_b, rule == "bounded", eps)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in args]
    wanted = taylor_coefficients(*exact, turns_b, rule, eps)
    incoming = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for t in outputs]
    leaves, exact = ([t for t in ts if t is not None] for ts in (args, exact))
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    exact_gradients = torch.autograd.grad(wanted, exact, [t.double() for t in incoming])
    for actual, expected in zip((*outputs, *gradients), (*wanted, *exact_gradients), strict=True):
        assert actual.dtype == args[0].dtype and actual.shape == expected.shape
        assert torch.linalg.norm(actual.double() - expected) <= CLOSE[actual.dtype] * torch.linalg.norm(expected)


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rp", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", CLOSE)
def test_the_operator_against_the_formula_in_float64(dtype, rp, scaled, rule, turns_b):
    # Under `reference` the smallest size is that of a scale held at one.
    for size in (1.0, 0.01, 30.0):
        assert_equal_to_the_formula(coefficients(dtype, rp, scaled=scaled, size=size), turns_b, rule, 0.7)


def test_the_operator_is_the_dense_rotation():
    b, c, e, scale = (t.detach() for t in coefficients(torch.float64, 3))
    for rule in ROTATION_SCALES:
        turned, q = ops.taylor_rotation(b, c, e, scale, True, rule == "bounded", 0.7)
        p = dense_rotation(c, e, "taylor", rule, 0.7)
        assert torch.allclose(turned[:, : b.shape[1]], p.T @ b, atol=1e-12)
        assert torch.allclose(dense(q / scale[:, None], turned[:, b.shape[1] :]), p, atol=1e-12)


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("rp", [1, 16])
@pytest.mark.parametrize("dtype", CLOSE)
def test_zero_factors_turn_nothing_in_the_operator(dtype, rp, rule, turns_b):
    b, c, e, scale = (t.detach() for t in coefficients(dtype, rp))
    zero, u_at = torch.zeros_like(c), b.shape[1]
    for pair in ((zero, e), (c, -c), (zero, zero), (c, zero)):  # C = 0; D = 0; both; D = C, where J = 0
        args = [t.clone().requires_grad_() for t in (b, *pair, scale)]
        turned, q = ops.taylor_rotation(*args, turns_b, rule == "bounded", 1.0)
        p = dense(q / scale[:, None], turned[:, u_at:])
        assert (p - torch.eye(len(b), dtype=dtype)).abs().max() < 50 * torch.finfo(dtype).eps
        assert torch.allclose(turned[:, :u_at], b, atol=50 * torch.finfo(dtype).eps)
        assert_equal_to_the_formula(args, turns_b, rule, 1.0)  # the gradients too, so they are finite


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("rule", ROTATION_SCALES)
def test_gradients_of_the_operator_by_finite_differences(rule, turns_b):
    for scaled in (True, False):
        args = coefficients(torch.float64, 2, r=3, scaled=scaled, out=7)
        assert torch.autograd.gradcheck(ops.taylor_rotation, (*args, turns_b, rule == "bounded", 0.7))


@pytest.mark.parametrize("turns_b", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", CLOSE)
def test_opcheck(dtype, scaled, bounded, turns_b):
    b, c, e, scale = (None if t is None else t.detach() for t in coefficients(dtype, 2, scaled=scaled))
    options = (turns_b, bounded, 0.7)
    torch.library.opcheck(torch.ops.sora_hw.taylor_rotation, (b, c, e, scale, *options))
    outputs = torch.ops.sora_hw.taylor_rotation(b, c, e, scale, *options)
    torch.library.opcheck(
        torch.ops.sora_hw.taylor_rotation_backward, (*outputs[:2], b, c, e, scale, outputs[2], *options)
    )


@pytest.mark.parametrize("rp", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_turned_in_float32(dtype, rp):
    b, c, e, delta = (t.detach().to(dtype).requires_grad_() for t in coefficients(torch.float32, rp))
    parameters = {"B": b, "post_C": c, "post_E": e, "pre_delta": delta, "A": b.new_zeros(5, 8)}
    linear = linear_map(Conditioning("diagonal", "rotation"), parameters, 1.0)
    wanted = taylor_coefficients(
        *(t.detach().double() for t in (b, c, e)), 1 + delta.detach().double(), True, "bounded"
    )
    for actual, expected in zip((linear.b, linear.q), wanted, strict=True):
        assert actual.dtype == torch.float32
        assert torch.linalg.norm(actual.double() - expected) <= CLOSE[torch.float32] * torch.linalg.norm(expected)
    for gradient in torch.autograd.grad(linear.b.square().sum() + linear.q.square().sum(), [b, c, e, delta]):
        assert gradient.dtype == dtype and torch.isfinite(gradient).all()
