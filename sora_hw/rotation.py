"""Low-rank rotations of the output features: `P = exp(s_p J)` with a skew-symmetric `J` of rank at most `2 rp`.

With `J = D C^T - C D^T` for factors `C`, `D` of shape `(out, rp)`, every form of the exponential offered here is the
identity plus a low-rank term, `P = I + U V^T`, so `P` (out, out) is never built. Source: the paper, section "SORA" and
Theorem 2; the low-rank Cayley and exponential forms are this project's.

Parametrisation. The stored factors are `C` and `E = D - C`. `D C^T - C D^T = E C^T - C E^T` holds exactly, and with
`E = 0` at the start the rotation is the identity without any cancellation: near the identity the difference of two
nearly equal products would lose all its digits in bfloat16.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sora_hw.ops import ZERO_NORM_PRODUCT

Rotation = Literal["taylor", "cayley", "exp"]
RotationScale = Literal["bounded", "reference"]
ROTATIONS: tuple[str, ...] = get_args(Rotation)
ROTATION_SCALES: tuple[str, ...] = get_args(RotationScale)


def rotation_scale(c: Tensor, e: Tensor, rule: RotationScale, eps: float) -> Tensor:
    """The factor `s_p` in front of `J`, differentiable.

    `bounded` is the paper's Theorem 2, `s_p = eps / (2 ||D||_F ||C||_F)`: then `||s_p J||_F <= eps` however large the
    factors grow. It is zero for a zero factor, so that `P = I` there. `reference` is the rule of the authors' released
    code, `min(1, 1 / (||C||_F + ||D||_F + 1e-6))`, which is not scale-invariant; `eps` plays no part in it.

    Args:
        c: factor `C`, (out, rp), float32 or float64.
        e: stored difference `E = D - C`, (out, rp).
        rule: `bounded` or `reference`.
        eps: the bound on `||s_p J||_F` under `bounded`.

    Returns:
        A scalar tensor.
    """
    norm_c = torch.linalg.vector_norm(c)
    norm_d = torch.linalg.vector_norm(c + e)
    if rule == "reference":
        return (1.0 / (norm_c + norm_d + 1e-6)).clamp(max=1.0)
    product = 2.0 * norm_c * norm_d
    # The floor keeps the division, and so its gradient, finite where the other factor makes the result zero.
    return (product > ZERO_NORM_PRODUCT) * eps / product.clamp(min=ZERO_NORM_PRODUCT)


def rotation_factors(
    c: Tensor,
    e: Tensor,
    rotation: Rotation = "taylor",
    scale_rule: RotationScale = "bounded",
    eps: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`U` and `V`, both (out, 2 rp), with `P = I + U V^T`; a row of features turns as `h P = h + (h U) V^T`.

    Write `s_p J = U K^T` with `U = [E, C]`, `K = s_p [C, -E]`, and `M = K^T U`, (2 rp, 2 rp). Then

    - `taylor`: `V = K`, the paper's first-order form, orthogonal up to `eps^2 / 8`;
    - `cayley`: `P = (I + s_p J / 2)(I - s_p J / 2)^{-1}`, `V = K (I - M / 2)^{-T}`, orthogonal;
    - `exp`: the exponential itself, `V = K phi(M)^T` with `phi(M) = sum_k M^k / (k + 1)!`, orthogonal.

    Only (2 rp, 2 rp) matrices are inverted or exponentiated. Computed in float32, or float64 for float64 factors;
    differentiable in both factors.

    Args:
        c: factor `C`, (out, rp).
        e: stored difference `E = D - C`, (out, rp).
        rotation: which form of the exponential.
        scale_rule: see `rotation_scale`.
        eps: see `rotation_scale`.
    """
    dtype = torch.promote_types(c.dtype, torch.float32)
    c, e = c.to(dtype), e.to(dtype)
    u = torch.cat([e, c], dim=1)
    k = rotation_scale(c, e, scale_rule, eps) * torch.cat([c, -e], dim=1)
    if rotation == "taylor":
        return u, k
    m = k.T @ u
    if rotation == "cayley":
        identity = torch.eye(m.shape[0], dtype=dtype, device=m.device)
        return u, torch.linalg.solve(identity - m / 2, k.T).T
    return u, k @ _phi(m).T


def _phi(m: Tensor) -> Tensor:
    """`sum_k m^k / (k + 1)!` as the top-right block of `exp([[m, I], [0, 0]])`, which needs no inverse of `m`."""
    n = m.shape[0]
    identity = torch.eye(n, dtype=m.dtype, device=m.device)
    top = torch.cat([m, identity], dim=1)
    return torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top)], dim=0))[:n, n:]
