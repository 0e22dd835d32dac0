"""The spectrum of what a layer has learned: the singular values of `dW = W' - W0`, their entropy, the stable rank.

Everything is float64. Where nothing scales the weight (LoRA, Pre-Ortho, Post-Ortho and pairs of rotations) `dW` is a
product of thin factors, and its singular values are those of a small core; a diagonal or a magnitude gives `dW` full
rank, and it is formed and decomposed whole.

Source: the paper, Figures 1, 2 and 4 and Theorem 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_hw.conditioning import Conditioning, LinearMap, Parameters, conditioned_weight, linear_map, low_rank_rows

CORE, DENSE = "core", "dense"  # how singular values were computed
# Shares of the largest singular value. At the first the squares leave an error of some 1e-9 of the largest; what lies
# below the second is told apart from the rest before what lies below the first is read.
SMALLEST_FROM_SQUARES, NEAR_THE_SMALLEST = 1e-6, 1e-4
_BLOCK = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")  # encoder.layer.3.output.dense: the number of its block, its place there


@dataclass(frozen=True)
class LayerSpectrum:
    """Of one layer's `dW = W' - W0`.

    Attributes:
        name: the layer's full name in the model, such as model.layers.0.self_attn.q_proj.
        shape: (out, in).
        computed: `CORE` or `DENSE`.
        entropy: of the singular values, nats.
        stable_rank: `||dW||_F^2 / ||dW||_2^2`.
        norm: `||dW||_F`.
        singular_values: descending; from a core only those that can differ from zero.
    """

    name: str
    shape: tuple[int, int]
    computed: str
    entropy: float
    stable_rank: float
    norm: float
    singular_values: tuple[float, ...]

    @classmethod
    def of(cls, name: str, shape: tuple[int, int], computed: str, sigma: Tensor) -> LayerSpectrum:
        """From the singular values, descending."""
        norm = torch.linalg.vector_norm(sigma).item()
        return cls(
            name, shape, computed, singular_value_entropy(sigma), stable_rank(sigma), norm, tuple(sigma.tolist())
        )

    @property
    def place(self) -> tuple[int, str]:
        """The number of the layer's block, and its name within it; block 0 for one outside of all blocks."""
        found = _BLOCK.fullmatch(self.name)
        return (int(found[1]), found[2]) if found else (0, self.name)


def how_computed(conditioning: Conditioning) -> str:
    """`CORE` where `dW` is a product of thin factors, otherwise `DENSE`."""
    return DENSE if conditioning.scales else CORE


def conditioned_singular_values(
    weight: Tensor, conditioning: Conditioning, parameters: Parameters, scaling: float
) -> Tensor:
    """The singular values of an adapter's `dW`, descending, float64, exact to its rounding.

    Args:
        weight: `W0`, (out, in), any floating dtype.
        conditioning: the pair of transformations.
        parameters: the adapter's, as `Conditioning.parameter_shapes` names them.
        scaling: `s`, the factor of the low-rank update.

    Returns:
        All min(out, in) of them; from the core only those that can differ from zero, at most r + 2 rp for one rotation.
    """
    p = {name: value.double() for name, value in parameters.items()}
    weight = weight.double()
    linear = _linear_map(weight, conditioning, p, scaling)
    if how_computed(conditioning) == CORE:
        return low_rank_singular_values(linear.b, low_rank_rows(weight, linear, p["A"], scaling))
    return singular_values(conditioned_weight(weight, linear, p["A"], scaling).sub_(weight))


def _linear_map(weight: Tensor, conditioning: Conditioning, p: Parameters, scaling: float) -> LinearMap:
    def row_norm(c: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
        base = weight if c is None else c[:, None] * weight
        return torch.linalg.vector_norm(torch.addmm(base, b, a), dim=1)

    return linear_map(conditioning, p, scaling, row_norm, pull_back=lambda q: weight.T @ q)


def low_rank_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of `left @ right`, descending, float64, without forming the product.

    Orthonormal factors of the two leave a core of min(out, R) x min(in, R) with the same singular values.

    Args:
        left: (out, R).
        right: (R, in).

    Returns:
        (min(out, in, R),); the others are zero.
    """
    upper_left = torch.linalg.qr(left.double(), mode="r").R
    upper_right = torch.linalg.qr(right.double().T, mode="r").R
    return torch.linalg.svdvals(upper_left @ upper_right.T)


def singular_values(update: Tensor) -> Tensor:
    """The singular values of `dW` (out, in), descending, float64, within 1e-8 of the largest.

    They are the roots of the eigenvalues of the smaller Gram matrix: that is several times as fast as to decompose `dW`
    itself, whose reduction waits for memory. Squaring costs the small ones half of their digits; those below
    `SMALLEST_FROM_SQUARES` of the largest are found again from `dW`, or, where they are many, all of them.
    """
    update = update.double()
    scale = update.abs().max()
    if not scale > 0:
        return torch.linalg.svdvals(update)
    scaled = update / scale  # whose squares neither overflow nor vanish
    tall = scaled if scaled.shape[0] >= scaled.shape[1] else scaled.T
    gram = tall.T @ tall
    squares = torch.linalg.eigvalsh(gram)
    small, near = ((squares < bound**2 * squares[-1]).sum() for bound in (SMALLEST_FROM_SQUARES, NEAR_THE_SMALLEST))
    if small > 0 and near > len(squares) // 16:
        return torch.linalg.svdvals(update)
    sigma = squares.flip(0).clamp(min=0.0).sqrt()
    if small > 0:
        sigma[-small:] = _smallest(tall, gram, squares[-1], near + 8)[-small:]
    return sigma * scale


def _smallest(tall: Tensor, gram: Tensor, largest: Tensor, count: int) -> Tensor:
    """The `count` smallest singular values of `tall`, (m, n), descending: the first of them roughly, the last exactly.

    Those of `tall` within the space that `gram^-1` turns any vectors to: at each turn it draws out directions a hundred
    times smaller than the ones left over by a factor of ten thousand. What rounding has done to `gram`, and the small
    number that keeps it invertible, hardly change that space.
    """
    n, double = len(gram), torch.finfo(torch.float64)
    lower = torch.linalg.cholesky(gram + torch.eye(n, dtype=torch.float64) * (4 * n * double.eps * largest))
    vectors = torch.randn(n, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        vectors = torch.linalg.qr(torch.cholesky_solve(vectors, lower)).Q
    return torch.linalg.svdvals(tall @ vectors)


def singular_value_entropy(sigma: Tensor) -> float:
    """`H = -sum p log p` with `p = sigma^2 / sum sigma^2`, in nats: log k for k equal values, at most log of their
    number. 0 for an update of zero, which has no directions."""
    shares = _relative_squares(sigma)
    return torch.special.entr(shares / shares.sum()).sum().item() if len(shares) else 0.0


def stable_rank(sigma: Tensor) -> float:
    """`||dW||_F^2 / ||dW||_2^2`, between 1 and the rank. 0 for an update of zero."""
    return _relative_squares(sigma).sum().item()


def _relative_squares(sigma: Tensor) -> Tensor:
    """`(sigma / largest)^2`, which neither overflows nor vanishes; empty where all are zero."""
    sigma = sigma.double()
    largest = sigma.max() if len(sigma) else 0.0
    return (sigma / largest).square() if largest > 0 else sigma[:0]
