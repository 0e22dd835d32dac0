"""The framework: placement x transformation, brought to one linear map.

A weight-conditioned layer computes `W' = post(pre(W0) + s B A)`, where `pre` and `post` act on the output features and
are each one of a few transformations (the paper, Tables 1 and 5, in the `torch.nn.Linear` convention). The two axes
are independent; the published methods are names for pairs, see `PRESETS`.

Every pair is one map of the base product `h = x W0^T`:

    y = c * h + z B'^T        with  z = [s x~ A^T, h Q],   x~ = dropout(x)

`c` (out,) is the diagonal, `B'` (out, R) the columns of everything of low rank, and `Q` (out, q) the directions that a
rotation reads from the base product. Without rotations q = 0 and R = r; each rotation adds 2 rp to both. So SORA is a
LoRA of rank r + 2 rp with a diagonal. The coefficients are small tensors built here with ordinary autograd; only the
map itself needs a kernel (`sora_hw.ops`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sora_hw import ops
from sora_hw.rotation import rotation_factors

PRE = ("none", "diagonal", "rotation")
POST = (*PRE, "magnitude")

# name -> (pre, post); the paper, Tables 1 and 5. DoRA is Liu et al. 2024.
PRESETS: dict[str, tuple[str, str]] = {
    "lora": ("none", "none"),
    "dora": ("none", "magnitude"),
    "post_diag": ("none", "diagonal"),
    "prediag": ("diagonal", "none"),
    "pre_ortho": ("rotation", "none"),
    "post_ortho": ("none", "rotation"),
    "sora": ("diagonal", "rotation"),
}

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What conditions the weight, and how.

    Args:
        pre: transformation of the frozen weight before the low-rank update is added: none, diagonal or rotation.
        post: transformation of the sum: those, or DoRA's magnitude.
        rotation: form of the exponential, see `rotation_factors`.
        rotation_scale: rule for `s_p`, see `rotation_scale`.
        rotation_eps: bound on `||s_p J||_F`.

    Raises:
        ValueError: for an unknown transformation.
    """

    pre: str = "none"
    post: str = "none"
    rotation: str = "taylor"
    rotation_scale: str = "bounded"
    rotation_eps: float = 1.0

    def __post_init__(self):
        if self.pre not in PRE:
            raise ValueError(f"pre={self.pre!r} is unknown: choose one of {', '.join(PRE)}")
        if self.post not in POST:
            raise ValueError(f"post={self.post!r} is unknown: choose one of {', '.join(POST)}")

    @property
    def scales(self) -> bool:
        """Whether the map has a `c` other than one."""
        return self.pre == "diagonal" or self.post in ("diagonal", "magnitude")

    @property
    def turns(self) -> bool:
        """Whether there is a rotation."""
        return "rotation" in (self.pre, self.post)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that this pair of transformations has."""
        return tuple(self.parameter_shapes(1, 1, 1, 1))

    def parameter_shapes(self, in_features: int, out_features: int, r: int, rp: int) -> dict[str, tuple[int, ...]]:
        """The parameters of an adapter and their shapes: only those that this pair of transformations has."""
        shapes: dict[str, tuple[int, ...]] = {"A": (r, in_features), "B": (out_features, r)}
        for place, transformation in (("pre", self.pre), ("post", self.post)):
            if transformation == "diagonal":
                shapes[f"{place}_delta"] = (out_features,)
            elif transformation == "rotation":
                shapes[f"{place}_C"] = shapes[f"{place}_E"] = (out_features, rp)
        if self.post == "magnitude":
            shapes["magnitude"] = (out_features,)
        return shapes


class LinearMap(NamedTuple):
    """Coefficients of `y = c * h + z B'^T`, `z = [s x~ A^T, h Q]`. All in float32, or float64 for a float64 layer.

    Attributes:
        c: (out,), or None for one.
        b: `B'`, (out, r + q).
        q: `Q`, (out, q), or None without a rotation.
    """

    c: Tensor | None
    b: Tensor
    q: Tensor | None


# ||c W0 + b a||_row, (out,), of c (out,) or None, b (out, R) and a (R, in); a constant to autograd
RowNorm = Callable[[Tensor | None, Tensor, Tensor], Tensor]
# W0^T q, (in, k), of q (out, k)
PullBack = Callable[[Tensor], Tensor]


def linear_map(
    conditioning: Conditioning,
    parameters: Parameters,
    scaling: float,
    row_norm: RowNorm | None = None,
    pull_back: PullBack | None = None,
) -> LinearMap:
    """The coefficients of one adapter, differentiable in its parameters.

    Args:
        conditioning: the pair of transformations.
        parameters: name without prefix -> tensor, as `Conditioning.parameter_shapes` names them.
        scaling: `s`, the factor of the low-rank update.
        row_norm: norm of the rows of `pre(W0) + s B A`; called only for a magnitude, without gradient.
        pull_back: `W0^T q`; called only for a rotation before a magnitude, without gradient.
    """
    dtype = torch.promote_types(parameters["B"].dtype, torch.float32)
    p = {name: value if value.dtype == dtype else value.to(dtype) for name, value in parameters.items()}
    c, b, reads = None, p["B"], []

    if conditioning.pre == "diagonal":
        c = 1 + p["pre_delta"]
    elif conditioning.pre == "rotation":
        b, q = _rotated(conditioning, p, "pre", b, None)
        reads = [q]

    if conditioning.post == "diagonal":
        d = 1 + p["post_delta"]
        c, b = _scaled(c, d), d[:, None] * b
    elif conditioning.post == "rotation":
        b, q = _rotated(conditioning, p, "post", b, c)
        reads.append(q)
    elif conditioning.post == "magnitude":
        a = scaling * p["A"].detach()
        with torch.no_grad():
            if reads:
                a = torch.cat([a, pull_back(reads[0]).T.to(dtype)])
            norm = row_norm(c, b, a).to(dtype)
        m = p["magnitude"] / norm.masked_fill(norm == 0, math.inf)  # a row of zeros has no direction: it stays zero
        c, b = _scaled(c, m), m[:, None] * b

    q = None if not reads else reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)
    return LinearMap(c, b, q)


def diagonal(conditioning: Conditioning, parameters: Parameters) -> Tensor | None:
    """The `c` of `linear_map`, (out,), without the rest of it, of a conditioning without a magnitude; None for one."""
    dtype, c = torch.promote_types(parameters["B"].dtype, torch.float32), None
    for place, transformation in (("pre", conditioning.pre), ("post", conditioning.post)):
        if transformation == "diagonal":
            c = _scaled(c, 1 + parameters[f"{place}_delta"].to(dtype))
    return c


def conditioned_weight(weight: Tensor, linear: LinearMap, a: Tensor, scaling: float) -> Tensor:
    """The dense `W' = c W0 + B' [s A; Q^T W0]`, (out, in): for merging and analysis, in the dtype of the coefficients.

    Args:
        weight: `W0`, (out, in).
        linear: the coefficients.
        a: `A`, (r, in).
        scaling: `s`.
    """
    weight = weight.to(linear.b.dtype)
    return torch.addmm(_scaled(linear.c, weight), linear.b, low_rank_rows(weight, linear, a, scaling))


def low_rank_rows(weight: Tensor | None, linear: LinearMap, a: Tensor, scaling: float) -> Tensor:
    """`[s A; Q^T W0]`, (r + q, in): what `B'` multiplies in `W'`. Arguments as of `conditioned_weight`.

    Without a rotation the weight may be None.
    """
    rows = scaling * a.to(linear.b.dtype)
    return rows if linear.q is None else torch.cat([rows, linear.q.T @ weight.to(rows.dtype)])


def conditioned_bias(bias: Tensor, linear: LinearMap) -> Tensor:
    """The bias `b0` (out,) scaled and rotated like a row of the base product, as the authors' released layer does."""
    bias = bias.to(linear.b.dtype)
    conditioned = _scaled(linear.c, bias)
    if linear.q is not None:
        conditioned = conditioned + linear.b[:, -linear.q.shape[1] :] @ (linear.q.T @ bias)
    return conditioned


def _rotated(
    conditioning: Conditioning, p: Parameters, place: str, b: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`B'` and `Q` after a rotation: one after the update turns its columns `b`, one before it stands beside them."""
    factors, rule, eps = (p[f"{place}_C"], p[f"{place}_E"]), conditioning.rotation_scale, conditioning.rotation_eps
    if conditioning.rotation == "taylor":
        return ops.taylor_rotation(b, *factors, c, place == "post", rule == "bounded", eps)
    u, v = rotation_factors(*factors, conditioning.rotation, rule, eps)
    turned = b + v @ (u.T @ b) if place == "post" else b
    return torch.cat([turned, v], dim=1), _scaled(c, u)


def _scaled(c: Tensor | None, t: Tensor) -> Tensor:
    """`t` with its output features, the first dimension, scaled by `c`; `t` itself for None."""
    if c is None:
        return t
    return c * t if t.dim() == 1 else c[:, None] * t
