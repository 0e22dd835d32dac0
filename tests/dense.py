"""The formulas of the framework, dense and in float64: the reference that the layer is held against.

Written from the definitions (the paper, Tables 1 and 5, Theorem 2), with the full (out, out) rotation and the full
weight; nothing here is shared with the package.
"""

import torch
from torch import Tensor


def rotation(c: Tensor, e: Tensor, kind: str, rule: str = "bounded", eps: float = 1.0) -> Tensor:
    """`P` (out, out) of `C` and `E = D - C`; rows of features turn as `h P`."""
    d = c + e
    if rule == "bounded":
        s = eps / (2 * torch.linalg.norm(d) * torch.linalg.norm(c))
    else:
        s = torch.clamp(1 / (torch.linalg.norm(c) + torch.linalg.norm(d) + 1e-6), max=1.0)
    j = s * (d @ c.T - c @ d.T)
    identity = torch.eye(len(c), dtype=c.dtype)
    if kind == "taylor":
        return identity + j
    if kind == "cayley":
        return torch.linalg.solve(identity - j / 2, identity + j / 2)
    return torch.matrix_exp(j)


def taylor_coefficients(
    b: Tensor, c: Tensor, e: Tensor, scale: Tensor | None, turns_b: bool, rule: str, eps: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`[P^T b, V]` or `[b, V]`, and `scale * U`, of the first-order `P = I + U V^T`; the identity for a zero factor."""
    norm_c, norm_d = torch.linalg.norm(c), torch.linalg.norm(c + e)
    if rule == "reference":
        s = torch.clamp(1 / (norm_c + norm_d + 1e-6), max=1.0)
    else:
        s = eps / (2 * norm_c * norm_d) if norm_c * norm_d > 0 else torch.zeros_like(norm_c)
    u, v = torch.cat([e, c], dim=1), s * torch.cat([c, -e], dim=1)
    turned = b + v @ (u.T @ b) if turns_b else b
    return torch.cat([turned, v], dim=1), u if scale is None else scale[:, None] * u


def transformed(rows: Tensor, place: str, transformation: str, p: dict[str, Tensor], **rotation_kind) -> Tensor:
    """Rows of output features (..., out) after one transformation other than the magnitude."""
    if transformation == "diagonal":
        return rows * (1 + p[f"{place}_delta"])
    if transformation == "rotation":
        return rows @ rotation(p[f"{place}_C"], p[f"{place}_E"], **rotation_kind)
    return rows


def weight(w0: Tensor, pre: str, post: str, p: dict[str, Tensor], s: float, **rotation_kind) -> Tensor:
    """`W'` (out, in); DoRA's norm detached."""
    w = transformed(w0.T, "pre", pre, p, **rotation_kind).T + s * p["B"] @ p["A"]
    if post == "magnitude":
        return (p["magnitude"] / torch.linalg.norm(w, dim=1).detach())[:, None] * w
    return transformed(w.T, "post", post, p, **rotation_kind).T


def output(
    x: Tensor,
    x_dropped: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    pre: str,
    post: str,
    p: dict[str, Tensor],
    s: float,
    condition_bias: bool = False,
    **rotation_kind,
) -> Tensor:
    """The layer's output; dropout acts on the input of the low-rank path only, the bias follows unless conditioned."""
    b0 = torch.zeros(len(w0), dtype=w0.dtype) if bias is None else bias
    rows = x @ w0.T + (b0 if condition_bias else 0)
    rows = transformed(rows, "pre", pre, p, **rotation_kind) + s * (x_dropped @ p["A"].T) @ p["B"].T
    if post == "magnitude":
        w = transformed(w0.T, "pre", pre, p, **rotation_kind).T + s * p["B"] @ p["A"]
        rows = rows * (p["magnitude"] / torch.linalg.norm(w, dim=1).detach())
    else:
        rows = transformed(rows, "post", post, p, **rotation_kind)
    return rows if condition_bias else rows + b0
