"""The coefficients of a first-order rotation, and their gradients by hand: a few products instead of a graph of many.

With `U = [E, C]`, `V = s_p [C, -E]`, the rotation of the columns of `b` is `b + V (U^T b)`, and what is left for the
backward pass are `U^T b` and the two norms that `s_p` is made of. See `sora_hw.ops.taylor_rotation`.
"""

import torch
from torch import Tensor

from sora_hw.ops import scale_and_slopes


def forward(
    b: Tensor, c: Tensor, e: Tensor, scale: Tensor | None, turns_b: bool, bounded: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`[b + V (U^T b), V]`, or `[b, V]`; `(scale * U)^T`; and `U^T b`, `||C||^2`, `||C + E||^2` in one vector."""
    u = torch.cat([e, c], dim=1)
    norms = torch.stack([c.square().sum(), (c + e).square().sum()])
    factor, _, _ = scale_and_slopes(*norms.sqrt(), bounded, eps)
    v = factor * torch.cat([c, -e], dim=1)
    q_t = (u if scale is None else scale[:, None] * u).t().contiguous()
    if not turns_b:
        return torch.cat([b, v], dim=1), q_t, norms
    u_b = u.t() @ b
    return torch.cat([torch.addmm(b, v, u_b), v], dim=1), q_t, torch.cat([u_b.flatten(), norms])


def backward(
    dturned: Tensor,
    dq_t: Tensor,
    b: Tensor,
    c: Tensor,
    e: Tensor,
    scale: Tensor | None,
    sums: Tensor,
    turns_b: bool,
    bounded: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of b, c, e and scale; the last without elements where there is none."""
    r, rp = b.shape[1], c.shape[1]
    u, d = torch.cat([e, c], dim=1), c + e
    norm_c, norm_d = sums[-2:].sqrt()
    factor, slope_c, slope_d = scale_and_slopes(norm_c, norm_d, bounded, eps)
    db, dv = dturned[:, :r], dturned[:, r:]
    dq = dq_t.t().contiguous()  # the sums below take on its layout, and the gradients are to be row by row
    du = dq if scale is None else scale[:, None] * dq
    if turns_b:
        u_b, v_db = sums[:-2].view(2 * rp, r), factor * (torch.cat([c, -e], dim=1).t() @ db)
        du = torch.addmm(du, b, v_db.t())
        dv = torch.addmm(dv, db, u_b.t())
        db = torch.addmm(db, u, v_db)
    dfactor = (dv[:, :rp] * c).sum() - (dv[:, rp:] * e).sum()
    through_norm_d = dfactor * slope_d * d
    dc = du[:, rp:] + factor * dv[:, :rp] + dfactor * slope_c * c + through_norm_d
    de = du[:, :rp] - factor * dv[:, rp:] + through_norm_d
    dscale = b.new_empty(0) if scale is None else (u * dq).sum(1)
    return db.contiguous(), dc, de, dscale
