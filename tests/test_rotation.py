"""Rotations against the dense exponential, the dense Cayley transform, and the paper's Theorem 2."""

import pytest
import torch
from dense import rotation as dense_rotation
from hypothesis import given, settings
from hypothesis import strategies as st

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
        assert torch.allclose(dense(*rotation_factors(c, e, kind, rule, 0.7)), expected, rtol=0, atol=1e-12)


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
