"""Singular values against dense float64 formulas, entropy and stable rank against closed forms, Theorem 1."""

import math

import numpy
import pytest
import torch
from dense import weight as dense_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_hw.analysis.spectrum import (
    CORE,
    DENSE,
    LayerSpectrum,
    conditioned_singular_values,
    how_computed,
    low_rank_singular_values,
    singular_value_entropy,
    singular_values,
    stable_rank,
)
from sora_hw.conditioning import POST, PRE, PRESETS, Conditioning
from sora_hw.rotation import ROTATION_SCALES, ROTATIONS

DOUBLE = torch.float64


def adapter(conditioning: Conditioning, out: int, inn: int, r: int = 4, rp: int = 2, seed: int = 0):
    """`W0` and an adapter far from its start, float64."""
    g = torch.Generator().manual_seed(seed)
    w0 = torch.randn(out, inn, generator=g, dtype=DOUBLE)
    shapes = conditioning.parameter_shapes(inn, out, r, rp)
    p = {name: 0.3 * torch.randn(shape, generator=g, dtype=DOUBLE) for name, shape in shapes.items()}
    if "magnitude" in p:
        p["magnitude"] = torch.linalg.norm(w0, dim=1) * (1 + p["magnitude"])
    return w0, p


def numpy_singular_values(conditioning: Conditioning, w0, p, s) -> torch.Tensor:
    """From the definition: the full rotation, the full weight, NumPy's decomposition."""
    rotation = {"kind": conditioning.rotation, "rule": conditioning.rotation_scale, "eps": conditioning.rotation_eps}
    update = dense_weight(w0, conditioning.pre, conditioning.post, p, s, **rotation) - w0
    return torch.from_numpy(numpy.linalg.svd(update.numpy(), compute_uv=False))


def check(conditioning: Conditioning, out: int, inn: int, s: float = 2.0) -> torch.Tensor:
    w0, p = adapter(conditioning, out, inn)
    expected = numpy_singular_values(conditioning, w0, p, s)
    sigma = conditioned_singular_values(w0, conditioning, p, s)
    assert sigma.dtype == DOUBLE
    assert torch.allclose(sigma, expected[: len(sigma)], rtol=0, atol=1e-8)
    assert (expected[len(sigma) :] < 1e-8).all()
    return sigma


@pytest.mark.parametrize(("out", "inn"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("post", POST)
@pytest.mark.parametrize("pre", PRE)
def test_every_pair_has_the_dense_singular_values(pre, post, out, inn):
    conditioning = Conditioning(pre, post)
    sigma = check(conditioning, out, inn)
    rotations = (pre, post).count("rotation")
    if how_computed(conditioning) == CORE:
        assert len(sigma) == 4 + 2 * 2 * rotations
    else:
        assert len(sigma) == min(out, inn)


def test_presets_that_nothing_scales_need_a_core_alone():
    computed = {name: how_computed(Conditioning(*pair)) for name, pair in PRESETS.items()}
    assert {name for name, how in computed.items() if how == CORE} == {"lora", "pre_ortho", "post_ortho"}
    assert {name for name, how in computed.items() if how == DENSE} == {"dora", "post_diag", "prediag", "sora"}


@pytest.mark.parametrize("method", ["pre_ortho", "post_ortho", "sora"])
@pytest.mark.parametrize("rule", ROTATION_SCALES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_form_of_the_rotation(method, rotation, rule):
    check(Conditioning(*PRESETS[method], rotation, rule, 0.7), 24, 40, s=0.5)


def test_a_core_wider_than_the_layer():
    """Of a layer of 5 x 30, r = 4 and a rotation of 2 give 8 directions, of which it has 5."""
    assert len(check(Conditioning(*PRESETS["post_ortho"]), 5, 30)) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["dora", "sora", "post_ortho"])
def test_narrow_tensors_are_taken_at_their_values(method, dtype):
    """Stored in a narrow dtype, the numbers are what they are, and everything that follows is float64."""
    conditioning = Conditioning(*PRESETS[method])
    w0, p = adapter(conditioning, 24, 40)
    w0, p = w0.to(dtype), {name: value.to(dtype) for name, value in p.items()}
    wide = {name: value.double() for name, value in p.items()}
    expected = numpy_singular_values(conditioning, w0.double(), wide, 2.0)
    sigma = conditioned_singular_values(w0, conditioning, p, 2.0)
    assert torch.allclose(sigma, expected[: len(sigma)], rtol=0, atol=1e-10)


def test_thin_factors():
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=g, dtype=DOUBLE) for shape in ((30, 5), (5, 20)))
    assert torch.allclose(low_rank_singular_values(left, right), singular_values(left @ right)[:5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_equal_values(count, size):
    sigma = torch.full((count,), size, dtype=DOUBLE)
    assert singular_value_entropy(sigma) == pytest.approx(math.log(count), abs=1e-12)
    assert stable_rank(sigma) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
def test_a_geometric_spectrum(ratio):
    """`sigma_i = ratio^i`: with `q = ratio^2` the shares are geometric, `H = -log(1 - q) - q log q / (1 - q)`."""
    sigma = ratio ** torch.arange(1000, dtype=DOUBLE)
    q = ratio**2
    assert singular_value_entropy(sigma) == pytest.approx(-math.log(1 - q) - q * math.log(q) / (1 - q), abs=1e-10)
    assert stable_rank(sigma) == pytest.approx(1 / (1 - q), rel=1e-12)


def test_two_values():
    sigma = torch.tensor([2.0, 1.0, 0.0])
    assert singular_value_entropy(sigma) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2), rel=1e-12)
    assert stable_rank(sigma) == pytest.approx(1.25, rel=1e-12)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_an_update_of_zero_has_no_directions(count):
    assert singular_value_entropy(torch.zeros(count)) == stable_rank(torch.zeros(count)) == 0.0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query", (3, "attention.self.query")),
        ("model.layers.11.mlp.up_proj", (11, "mlp.up_proj")),
        ("lm_head", (0, "lm_head")),
    ],
)
def test_where_a_layer_is(name, place):
    assert LayerSpectrum.of(name, (2, 2), CORE, torch.ones(1)).place == place


# Theorem 1. The paper's step model: LoRA's `dW` has r singular values that are equal, and zeros; what DoRA's magnitude
# adds is a tail of full rank. The entropy of LoRA's step is log r, its greatest possible.
#
# Lemma. Appending values that are positive and not above the smallest raises the entropy of a spectrum, strictly.
#   With t_i = sigma_i^2 and Z = sum t_i, H = log Z - sum t_i log t_i / Z, and in an appended t_n = x,
#   dH/dx = (sum t_i log t_i / Z - log x) / Z, the mean of log t_i, weighted by t_i / Z, less log x: positive for
#   0 < x < min t_i.
# So a step with any tail exceeds the step, and every spectrum of more than r values that of its r largest.

steps = st.lists(st.tuples(st.integers(1, 6), st.floats(0.05, 1.0)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(r=st.integers(1, 32), large=st.floats(1e-3, 1e3), tail=steps)
def test_theorem_1_a_tail_raises_the_entropy_of_a_step(r, large, tail):
    """r equal values and a tail of random steps, none above them: more than log r."""
    heights = [height for count, height in tail for _ in range(count)]
    sigma = large * torch.tensor([1.0] * r + heights, dtype=DOUBLE)
    assert singular_value_entropy(sigma) > math.log(r)


@settings(max_examples=200, deadline=None)
@given(steps=steps, extra=st.integers(1, 20), share=st.floats(0.05, 1.0))
def test_theorem_1_for_any_steps(steps, extra, share):
    """Steps of any heights, and a tail that is not above the lowest."""
    sigma = torch.tensor([height for count, height in steps for _ in range(count)], dtype=DOUBLE)
    tail = torch.full((extra,), share * sigma.min().item(), dtype=DOUBLE)
    assert singular_value_entropy(torch.cat([sigma, tail])) > singular_value_entropy(sigma)


@settings(max_examples=100, deadline=None)
@given(
    r=st.integers(1, 6),
    rest=st.integers(1, 18),
    size=st.floats(0.2, 2.0),
    weight=st.floats(0.5, 2.0),
    up=st.floats(0.0, 0.3),
    data=st.data(),
)
def test_theorem_1_for_weights(r, rest, size, weight, up, data):
    """The step model as weights: DoRA's update has more entropy than LoRA's, through the code that computes both.

    The rows of `W0` are orthogonal, `w_i v_i`, and LoRA adds `a` times `v_i` to the first r: its step. Magnitudes
    `m_i` times the norm of a row make DoRA's singular values `|m_i (w_i + a) - w_i|` and, behind the first r,
    `|m_i - 1| w_i`. The first r share `w` and `m >= 1`, so they are equal, at least `a`; the tail is kept at or below
    `a`, and above zero: the range in which the lemma holds.
    """
    n = r + rest
    v = torch.linalg.qr(torch.randn(n + 3, n, generator=torch.Generator().manual_seed(n), dtype=DOUBLE)).Q.T
    norms = torch.tensor([weight] * r + [data.draw(st.floats(0.5, 2.0)) for _ in range(rest)], dtype=DOUBLE)
    shares = [data.draw(st.floats(0.05, 1.0)) * data.draw(st.sampled_from([-1, 1])) for _ in range(rest)]
    factors = torch.tensor([1 + up] * r + shares, dtype=DOUBLE)
    factors[r:] = (1 + factors[r:] * size / norms[r:]).clamp(min=0.0)
    w0 = norms[:, None] * v
    p = {"A": v[:r], "B": torch.eye(n, dtype=DOUBLE)[:, :r]}
    low_rank = conditioned_singular_values(w0, Conditioning(*PRESETS["lora"]), p, size)
    assert torch.allclose(low_rank, torch.full((r,), size, dtype=DOUBLE), rtol=1e-12)
    p["magnitude"] = factors * torch.linalg.norm(w0 + size * p["B"] @ p["A"], dim=1)
    sigma = conditioned_singular_values(w0, Conditioning(*PRESETS["dora"]), p, size)
    expected = torch.cat([(factors * (norms + size) - norms)[:r], ((factors - 1).abs() * norms)[r:]])
    assert torch.allclose(sigma, expected.sort(descending=True).values, rtol=0, atol=1e-12)
    assert singular_value_entropy(sigma) > singular_value_entropy(low_rank) == pytest.approx(math.log(r), abs=1e-12)


@pytest.mark.parametrize("spike", [0.0, 1.0, 1e3, 1e8])
@pytest.mark.parametrize(("out", "inn"), [(96, 96), (64, 128), (128, 64)])
def test_small_values_keep_their_digits(out, inn, spike):
    """Beside 4 directions `spike` times as large: from squares where those suffice, otherwise from the matrix."""
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(out, 4, generator=generator).double() @ torch.randn(4, inn, generator=generator).double()
    update = torch.randn(out, inn, generator=generator).double() + spike * low_rank
    expected = numpy.linalg.svd(update.numpy(), compute_uv=False)
    assert numpy.abs(singular_values(update).numpy() - expected).max() <= 1e-10 * expected[0]
    assert numpy.abs(singular_values(1e-170 * update).numpy() - 1e-170 * expected).max() <= 1e-180 * expected[0]


@pytest.mark.parametrize("smallest", [[0.0], [3e-7] * 10, [2e-4, 9e-5, 9e-7, 1e-9, 1e-12, 0.0]])
@pytest.mark.parametrize(("out", "inn"), [(320, 320), (320, 400), (400, 320)])
def test_a_few_values_near_zero_are_found_without_decomposing_the_matrix(out, inn, smallest, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 320, generator=generator, dtype=DOUBLE)).Q for size in (out, inn))
    sigma = torch.cat([torch.logspace(0, -3, 320 - len(smallest)), torch.tensor(smallest)]).double()
    decompose = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: decompose(m) if min(m.shape) < 40 else pytest.fail("all"))
    assert torch.allclose(singular_values(7 * (u * sigma) @ v.T), 7 * sigma, rtol=0, atol=1e-11)


def test_a_rank_that_is_lacking_is_not_made_up():
    left, right = torch.randn(64, 5).double(), torch.randn(5, 48).double()
    found = singular_values(left @ right)
    assert (found[5:] <= 1e-13 * found[0]).all()
