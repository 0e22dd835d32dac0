"""The operators: schemas, shape functions and autograd formulas, once for every device.

A kernel package registers an implementation per dispatch key; the device of the tensors decides, per call. Packages
are found through the entry-point group `sora_hw.kernels`, whose entries are named by device type, so a vendor can
add a device without touching this repository. A device that no package serves raises `NotImplementedError`.

    z = x a^T                                 `skinny_product`, and with dropout on the way to a layer `low_rank_input`
    y = scale * base + z b^T + bias           `scale_rank_update`
    n = || scale * W0 + b a ||_row            `factored_row_norm`
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal, get_args

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


def skinny_product(x: Tensor, a: Tensor) -> Tensor:
    """`z = x a^T`, (..., R), of x (..., in) and a (R, in), in the dtype of `x`.

    The vendor's matrix product on every device. Few rows make it bound by the read of `x`, and with those rows first
    it is fastest (bfloat16, R = 18, x86-64 server part: 2.8 times), so `z` is laid out feature by feature. The
    gradient of `x` is a tensor of its own, which autograd adds to in place.
    """
    return _SkinnyProduct.apply(x, a.to(x.dtype))


def low_rank_input(x: Tensor, a: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """`x` and `z = dropout(x) a^T`. What else reads `x`, the frozen layer first of all, should read the `x` returned.

    The gradient that comes back through that `x` and `dz a`, the one through `z`, then meet in one pass over (N, in)
    (`input_gradient`) instead of in three to five: a product, the mask of the dropout, a sum.

    Args:
        x: (..., in).
        a: (R, in), any floating dtype.
        dropout: probability; on processors and GPUs the mask is the one that `torch.nn.functional.dropout` draws.

    Returns:
        `x`, as a view where it has a gradient, and `z`, (..., R), in its dtype.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, skinny_product(torch.nn.functional.dropout(x, dropout) if dropout else x, a)
    return _LowRankInput.apply(x, a.to(x.dtype), dropout)


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
    return _ScaleRankUpdate.apply(base.flatten(0, -2), scale, z.flatten(0, -2), b, bias, keep).view(base.shape)


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


def empty_gradients(
    grad: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None, need_base: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward operator, unfilled: the gradients of base, z, b, scale and bias.

    What is not asked for has no elements. The gradient of `base` is not computed without a `scale`: it is `grad`.
    """
    nothing = grad.new_empty(0)
    return (
        grad.new_empty(grad.shape) if need_base and scale is not None else nothing,
        torch.empty_like(z),
        b.new_empty(b.shape),
        nothing.clone() if scale is None else scale.new_empty(scale.shape),
        nothing.clone() if bias is None else bias.new_empty(bias.shape),
    )


def _product(x: Tensor, a: Tensor) -> Tensor:
    return (a @ x.reshape(-1, x.shape[-1]).t()).t().unflatten(0, x.shape[:-1])


# The gradients are written as `torch.autograd.Function`, not registered with the operators: a layer costs a handful of
# these calls, and a registered one takes 30 us longer, as much as a whole low-rank layer elsewhere.
class _SkinnyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return _product(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, a = ctx.saved_tensors
        dx = torch.matmul(dz, a) if ctx.needs_input_grad[0] else None
        da = dz.flatten(0, -2).t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, da


class _LowRankInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, dropout):
        ctx.mask_scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
        dropped, mask = torch.ops.sora_hw.dropout(x, dropout) if dropout else (x, None)
        ctx.save_for_backward(dropped, a, mask)
        ctx.set_materialize_grads(False)
        return x.view_as(x), _product(dropped, a)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dz):
        if dz is None:
            return dx, None, None
        dropped, a, mask = ctx.saved_tensors
        da = dz.flatten(0, -2).t() @ dropped.reshape(-1, dropped.shape[-1]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(dropped) if dx is None else dx
            mask = None if mask is None else mask.flatten(0, -2)
            whole = torch.ops.sora_hw.input_gradient(dx.flatten(0, -2), dz.flatten(0, -2), a, mask, ctx.mask_scale)
            dx = whole.view(dx.shape)
        return dx, da, None


class _ScaleRankUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, scale, z, b, bias, keep):
        y = torch.ops.sora_hw.scale_rank_update(base, scale, z, b, bias)
        ctx.keep = keep
        # Only the gradient of `scale` needs the base product or the output.
        saved = z if scale is None else y if keep == "output" else base
        # One more tensor for every other way: if a recomputation under gradient checkpointing kept something else than
        # its forward pass, torch notices it by the number of tensors and raises an error.
        marks = [base.new_empty(0)] * _WAYS_TO_KEEP.index(keep)
        ctx.save_for_backward(saved, scale, z, b, bias, *marks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, scale, z, b, bias, *_ = ctx.saved_tensors
        need_base = ctx.needs_input_grad[0]
        if ctx.keep == "inputs" and scale is not None:
            saved = torch.ops.sora_hw.scale_rank_update(saved, scale, z, b, bias)
        dbase, dz, db, dscale, dbias = torch.ops.sora_hw.scale_rank_update_backward(
            grad, saved, scale, z, b, bias, ctx.keep == "base", need_base
        )
        if scale is None:
            dbase, dscale = grad, None
        if bias is None:
            dbias = None
        return dbase if need_base else None, dscale, dz, db, dbias, None


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
