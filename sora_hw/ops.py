"""The operators: schemas, shape functions and autograd formulas, once for every device.

A kernel package registers an implementation per dispatch key; the device of the tensors decides, per call. Packages
are found through the entry-point group `sora_hw.kernels`, whose entries are named by device type, so a vendor can
add a device without touching this repository. A device that no package serves raises `NotImplementedError`.

    z = [s dropout(x) a^T, x (q^T W0)^T]      `low_rank_input`, and without all that `skinny_product`
    y = scale * base + z b^T + bias           `scale_rank_update`
    n = || scale * W0 + b a ||_row            `factored_row_norm`
    [b + V U^T b, V], scale * U               `taylor_rotation`
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import entry_points
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRY_POINT_GROUP = "sora_hw.kernels"

# What `scale_rank_update` keeps for the gradient of `scale`:
# - "output", which the next operator mostly keeps anyway. The gradient is read off it and divided by `scale`.
# - "inputs", for an output that will be written into: it is computed again, so the gradient is the same to the bit.
# - "base", the base product, for a `scale` that comes near zero: nothing is divided.
Keep = Literal["output", "inputs", "base"]
_WAYS_TO_KEEP = get_args(Keep)

# Below this product of norms a factor of a rotation counts as zero: it turns nothing, and dividing by the product would
# only magnify rounding errors.
ZERO_NORM_PRODUCT = 1e-12

torch.library.define(
    "sora_hw::dropout",
    "(Tensor x, float p) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
torch.library.define(
    "sora_hw::input_gradient",
    "(Tensor grad, Tensor dz, Tensor a, Tensor? mask, float mask_scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sora_hw::scale_rank_update",
    "(Tensor base, Tensor? scale, Tensor z, Tensor b, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sora_hw::scale_rank_update_backward",
    "(Tensor grad, Tensor saved, Tensor? scale, Tensor z, Tensor b, Tensor? bias, bool saved_base, bool need_base)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sora_hw::factored_row_norm",
    "(Tensor weight, Tensor norm_squared, Tensor? scale, Tensor b, Tensor a) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sora_hw::taylor_rotation",
    "(Tensor b, Tensor c, Tensor e, Tensor? scale, bool turns_b, bool bounded, float eps) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "sora_hw::taylor_rotation_backward",
    "(Tensor dturned, Tensor dq_t, Tensor b, Tensor c, Tensor e, Tensor? scale, Tensor sums, bool turns_b,"
    " bool bounded, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def skinny_product(x: Tensor, a: Tensor) -> Tensor:
    """`z = x a^T`, (..., R), of x (..., in) and a (R, in), in the dtype of `x`.

    The vendor's matrix product on every device. Few rows make it bound by the read of `x`, and with those rows first
    it is fastest (bfloat16, R = 18, x86-64 server part: 2.8 times), so `z` is laid out feature by feature. The
    gradient of `x` is a tensor of its own, which autograd adds to in place.
    """
    return _SkinnyProduct.apply(x, a.to(x.dtype))


class Probe(NamedTuple):
    """What a rotation reads off the input of a layer instead of its output: `x (q^T W0)^T`.

    Attributes:
        q: (out, k), float32 or wider.
        weight: `W0`, (out, in).
        value: `q^T W0`, (k, in), in the dtype of the weight, without a graph: the gradient flows to both all the same.
    """

    q: Tensor
    weight: Tensor
    value: Tensor


def low_rank_input(
    x: Tensor, a: Tensor, scaling: float = 1.0, dropout: float = 0.0, probe: Probe | None = None
) -> tuple[Tensor, Tensor]:
    """`x` and `z = [scaling * dropout(x) a^T, x (q^T W0)^T]`, the second part only with a `probe`.

    What else reads `x`, the frozen layer first of all, should read the `x` returned. The gradient that comes back
    through it and the one through `z` then meet in one pass over (N, in) (`input_gradient`) instead of in three to
    five: a product, the mask of the dropout, a sum.

    Args:
        x: (..., in).
        a: (r, in), any floating dtype.
        scaling: `s`.
        dropout: probability; on processors and GPUs the mask is the one that `torch.nn.functional.dropout` draws.
        probe: see `Probe`.

    Returns:
        `x`, as a view where it has a gradient, and `z`, (..., r + k), in its dtype.
    """
    q, weight, value = probe or (None, None, None)
    through, z = _LowRankInput.apply(x, a, scaling, dropout, q, weight, value)
    return through if x.requires_grad else x, z


def scale_rank_update(
    base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None = None, *, keep: Keep = "output"
) -> Tensor:
    """`y = scale * base + z b^T + bias`, accumulated in float32 (float64 for float64), returned in `base.dtype`.

    Args:
        base: the base product, (..., out); float32, float64, bfloat16 or float16.
        scale: `c`, (out,), float32 or wider; None for one.
        z: (..., R), of the dtype of `base`.
        b: `B'`, (out, R), any floating dtype.
        bias: (out,), float32 or wider; None for zero.
        keep: what the backward pass reads the gradient of `scale` from, see `Keep`.

    Returns:
        (..., out).
    """
    # The view is taken out here: a view that a Function returns may not be written into, as a ReLU in place does.
    return _ScaleRankUpdate.apply(base, scale, z, b, bias, keep).view(base.shape)


def taylor_rotation(
    b: Tensor, c: Tensor, e: Tensor, scale: Tensor | None, turns_b: bool, bounded: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """`B'` and `Q` of a rotation `P = I + U V^T` of the output features, `U = [E, C]`, `V = s_p [C, -E]`.

    The first-order rotation of `sora_hw.rotation.rotation_factors`, in one operator with its gradient: what it takes
    is small, but as a graph of a dozen small operations it would cost more than the layer that it belongs to.

    Args:
        b: (out, R), float32 or float64, as are the others.
        c: factor `C`, (out, rp).
        e: difference `E = D - C`, (out, rp).
        scale: `c` of what is rotated, (out,), or None for one.
        turns_b: whether the rotation turns the columns of `b`, or only stands beside them.
        bounded: the rule for `s_p`, see `sora_hw.rotation.rotation_scale`.
        eps: see there.

    Returns:
        `[b + V (U^T b), V]` or `[b, V]`, (out, R + 2 rp), and `scale * U`, (out, 2 rp), whose transpose is contiguous.
    """
    return _TaylorRotation.apply(b, c, e, scale, turns_b, bounded, eps)


def factored_row_norm(weight: Tensor, norm_squared: Tensor, scale: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """`|| scale * W0 + b a ||` of every row, without forming the sum.

    `n^2 = c^2 ||W0||^2 + 2 c rowsum((W0 a^T) * b) + rowsum((b (a a^T)) * b)`: one read of `W0`. No gradient: DoRA's
    norm is a constant to autograd by definition (Liu et al. 2024, section 4.3).

    Args:
        weight: `W0`, (out, in).
        norm_squared: `||W0||^2` of every row, (out,), float32 or wider; computed once and cached by the caller.
        scale: `c`, (out,), or None for one.
        b: (out, R).
        a: (R, in).

    Returns:
        (out,), of the dtype of `norm_squared`.
    """
    return torch.ops.sora_hw.factored_row_norm(weight, norm_squared, scale, b, a)


@torch.library.impl("sora_hw::dropout", "CompositeExplicitAutograd")
def _(x, p):
    # One that packs its mask, as torch_npu's does, has to be replaced by the device's kernel package.
    return torch.native_dropout(x, p, True)


@torch.library.register_fake("sora_hw::dropout")
def _(x, p):
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


@torch.library.register_fake("sora_hw::input_gradient")
def _(grad, dz, a, mask, mask_scale):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@torch.library.register_fake("sora_hw::scale_rank_update")
def _(base, scale, z, b, bias):
    return torch.empty_like(base, memory_format=torch.contiguous_format)


@torch.library.register_fake("sora_hw::scale_rank_update_backward")
def _(grad, saved, scale, z, b, bias, saved_base, need_base):
    return empty_gradients(grad, scale, z, b, bias, need_base)


@torch.library.register_fake("sora_hw::factored_row_norm")
def _(weight, norm_squared, scale, b, a):
    return torch.empty_like(norm_squared)


@torch.library.register_fake("sora_hw::taylor_rotation")
def _(b, c, e, scale, turns_b, bounded, eps):
    (out, r), rp = b.shape, c.shape[1]
    return b.new_empty(out, r + 2 * rp), b.new_empty(2 * rp, out), b.new_empty((2 * rp * r if turns_b else 0) + 2)


@torch.library.register_fake("sora_hw::taylor_rotation_backward")
def _(dturned, dq_t, b, c, e, scale, sums, turns_b, bounded, eps):
    nothing = b.new_empty(0)
    dscale = nothing if scale is None else torch.empty_like(scale)
    return b.new_empty(b.shape), c.new_empty(c.shape), e.new_empty(e.shape), dscale


def scale_and_slopes(norm_c: Tensor, norm_d: Tensor, bounded: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`s_p` of `||C||_F` and `||D||_F`, and its slopes over both, each divided by the norm itself.

    So the gradient of a factor `C` is `slope_c * C`; it is zero for a zero factor. The rules: `rotation_scale` of
    `sora_hw.rotation`.
    """
    if bounded:
        product = 2.0 * norm_c * norm_d
        turns = product > ZERO_NORM_PRODUCT
        factor = torch.where(turns, eps / torch.where(turns, product, 1.0), 0.0)
        return factor, *(-factor / torch.where(turns, norm.square(), 1.0) for norm in (norm_c, norm_d))
    inverse = 1.0 / (norm_c + norm_d + 1e-6)
    slope = torch.where(inverse > 1.0, 0.0, -inverse.square())
    slopes = (torch.where(norm > 0, slope / torch.where(norm > 0, norm, 1.0), 0.0) for norm in (norm_c, norm_d))
    return inverse.clamp(max=1.0), *slopes


def empty_gradients(
    grad: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None, need_base: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward operator, unfilled: the gradients of base, z, b, scale and bias.

    What is not asked for has no elements. The gradient of `base` is not computed without a `scale`: it is `grad`.
    """
    return (
        grad.new_empty(grad.shape if need_base and scale is not None else 0),
        torch.empty_like(z),
        b.new_empty(b.shape),
        grad.new_empty(0) if scale is None else scale.new_empty(scale.shape),
        grad.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _product(x: Tensor, a: Tensor) -> Tensor:
    return (a @ x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], a.shape[0])


def _differentiable_once(backward):
    """`once_differentiable`, but for what it costs where no gradient of the gradient is being asked for."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *gradients):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return checked


# The gradients are written as `torch.autograd.Function`, not registered with the operators: a layer costs a handful of
# these calls, and a registered one takes 30 us longer, as much as a whole low-rank layer elsewhere.
class _SkinnyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return _product(x, a)

    @staticmethod
    @_differentiable_once
    def backward(ctx, dz):
        x, a = ctx.saved_tensors
        dx = torch.matmul(dz, a) if ctx.needs_input_grad[0] else None
        da = dz.flatten(0, -2).t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, da


class _LowRankInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, scaling, dropout, q, weight, value):
        ctx.scaling, ctx.mask_scale = scaling, 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
        dropped, mask = torch.ops.sora_hw.dropout(x, dropout) if dropout else (x, None)
        own = torch.mul(a, scaling, out=x.new_empty(a.shape))
        read = None if value is None else value.to(x.dtype)
        if read is None:
            z = _product(dropped, own)
        elif mask is None:
            own, read = torch.cat([own, read]), None
            z = _product(x, own)
        else:
            z = torch.cat([_product(dropped, own), _product(x, read)], dim=-1)
        undropped = None if read is None else x
        ctx.save_for_backward(dropped, undropped, mask, own, read, a, q, weight)
        ctx.set_materialize_grads(False)
        return x.view_as(x), z

    @staticmethod
    @_differentiable_once
    def backward(ctx, dx, dz):
        if dz is None:
            return dx, None, None, None, None, None, None
        dropped, undropped, mask, own, read, a, q, weight = ctx.saved_tensors
        dz = dz.flatten(0, -2)
        r = a.shape[0]
        da = dq = dweight = None
        if ctx.needs_input_grad[1] or q is not None:
            rows = dropped.reshape(-1, dropped.shape[-1])
            if read is None:
                drows = dz.t() @ rows
                da, dvalue = drows[:r], drows[r:]
            else:
                da, dvalue = dz[:, :r].t() @ rows, dz[:, r:].t() @ undropped.reshape(rows.shape)
            da = da.to(a.dtype).mul_(ctx.scaling)
            if q is not None:
                dvalue = dvalue.to(weight.dtype)
                dq = (dvalue @ weight.t()).to(q.dtype).t()
                dweight = q.to(weight.dtype) @ dvalue if ctx.needs_input_grad[5] else None
        if ctx.needs_input_grad[0]:
            shape = dropped.shape
            dx = torch.zeros_like(dropped) if dx is None else dx
            dx = dx.flatten(0, -2)
            if read is not None:
                dx = torch.ops.sora_hw.input_gradient(dx, dz[:, r:], read, None, 1.0)
                dz = dz[:, :r]
            mask = None if mask is None else mask.flatten(0, -2)
            dx = torch.ops.sora_hw.input_gradient(dx, dz, own, mask, ctx.mask_scale).view(shape)
        return dx, da, None, None, dq, dweight, None


class _ScaleRankUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, scale, z, b, bias, keep):
        ctx.shapes, ctx.keep = (base.shape, z.shape), keep
        base, z = base.flatten(0, -2), z.flatten(0, -2)
        y = torch.ops.sora_hw.scale_rank_update(base, scale, z, b, bias)
        # Only the gradient of `scale` needs the base product or the output.
        saved = z if scale is None else y if keep == "output" else base
        # One more tensor for every other way: if a recomputation under gradient checkpointing kept something else than
        # its forward pass, torch notices it by the number of tensors and raises an error.
        marks = [base.new_empty(0) for _ in range(_WAYS_TO_KEEP.index(keep))]
        ctx.save_for_backward(saved, scale, z, b, bias, *marks)
        return y

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        saved, scale, z, b, bias, *_ = ctx.saved_tensors
        base_shape, z_shape = ctx.shapes
        need_base = ctx.needs_input_grad[0]
        if ctx.keep == "inputs" and scale is not None:
            saved = torch.ops.sora_hw.scale_rank_update(saved, scale, z, b, bias)
        dbase, dz, db, dscale, dbias = torch.ops.sora_hw.scale_rank_update_backward(
            grad, saved, scale, z, b, bias, ctx.keep == "base", need_base
        )
        dbase = (grad if scale is None else dbase).view(base_shape) if need_base else None
        return (
            dbase,
            dscale if scale is not None else None,
            dz.view(z_shape),
            db,
            dbias if bias is not None else None,
            None,
        )


class _TaylorRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b, c, e, scale, turns_b, bounded, eps):
        turned, q_t, sums = torch.ops.sora_hw.taylor_rotation(b, c, e, scale, turns_b, bounded, eps)
        ctx.save_for_backward(b, c, e, scale, sums)
        ctx.options = turns_b, bounded, eps
        return turned, q_t.t()

    @staticmethod
    @_differentiable_once
    def backward(ctx, dturned, dq):
        *inputs, sums = ctx.saved_tensors
        db, dc, de, dscale = torch.ops.sora_hw.taylor_rotation_backward(dturned, dq.t(), *inputs, sums, *ctx.options)
        return db, dc, de, None if inputs[3] is None else dscale, None, None, None


@dataclass(frozen=True)
class KernelPackage:
    """A kernel package as its entry point names it.

    Attributes:
        device_type: the device type it serves: the name of the entry point.
        module: the module that registers the implementations.
        distribution: the installed distribution and its version.
        error: why the module could not be imported, in one line; None where it was.
    """

    device_type: str
    module: str
    distribution: str
    error: str | None

    def describe(self) -> str:
        """The module, and which of its kernels serve on this machine where it tells (its function `describe`)."""
        tell = getattr(sys.modules.get(self.module), "describe", None)
        return f"{self.module}: {tell()}" if tell else self.module


_packages: list[KernelPackage] = []


def load_kernel_packages() -> None:
    """Import every kernel package there is, once. One that fails is recorded with its reason, not hidden."""
    if _packages:
        return
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        try:
            point.load()
            error = None
        except Exception as reason:  # whatever stops a vendor's package, the others and the library go on
            error = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
        _packages.append(KernelPackage(point.name, point.value, distribution, error))


def kernel_packages() -> list[KernelPackage]:
    """Every kernel package that was found, the broken ones with their reason."""
    return list(_packages)


def serving(device_type: str) -> KernelPackage | None:
    """The kernel package that serves a device type, or None."""
    return next((p for p in _packages if p.device_type == device_type and p.error is None), None)
