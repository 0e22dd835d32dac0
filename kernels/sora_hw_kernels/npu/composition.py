"""`y = scale * base + z b^T + bias` and its gradients from the vendor's operators, each over the whole tensor.

Row blocks, which serve a CPU's cache, would only add launches here. Elementwise arithmetic is in float32, in one
temporary of the size of the rows, which everything after reuses; the result is rounded once. The gradient of the input
and the products over the rows are in the dtype of the rows, accumulated in float32 inside the matrix unit.
"""

import functools

import torch
from torch import Tensor

from sora_hw.ops import empty_gradients


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    base = base.contiguous()
    y = base.to(dtype, copy=True) if scale is None else torch.mul(base, scale.to(dtype))
    y.addmm_(z.to(dtype), b.to(dtype).t())
    if bias is not None:
        y.add_(bias)
    return y.to(base.dtype)


def backward(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    bias: Tensor | None,
    saved_base: bool,
    need_base: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of base, z, b, scale and bias; see `sora_hw_kernels.reference.scale_rank.backward`."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dbase, dz, db, dscale, dbias = gradients = empty_gradients(grad, scale, z, b, bias, need_base)
    rank_gradients(grad, z, b, dz, db)
    if bias is not None:
        dbias.copy_(grad.sum(0, dtype=dtype))
    if scale is not None:
        product = saved.to(dtype, copy=True)
        if bias is not None and not saved_base:
            product.sub_(bias)
        sums = product.mul_(grad).sum(0)
        dscale.copy_(scale_gradient(sums, scale, b, db, saved_base))
        if need_base:
            dbase.copy_(torch.mul(grad, scale.to(dtype), out=product))
    return gradients


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """`x` with each element zero with probability `p`, else divided by `1 - p`; and which were kept, bool (..., in).

    The vendor's `native_dropout` packs that mask into bits, in which no other operator reads it.
    """
    kept = torch.rand_like(x, dtype=torch.float32) >= p
    return torch.mul(x, kept).mul_(1.0 / (1.0 - p) if p < 1.0 else 0.0), kept


def input_gradient(grad: Tensor, dz: Tensor, a: Tensor, mask: Tensor | None, mask_scale: float) -> Tensor:
    """(N, in); see `sora_hw_kernels.reference.scale_rank.input_gradient`."""
    grad = grad.contiguous()
    if mask is not None:
        return torch.add(grad, torch.mm(dz, a).mul_(mask), alpha=mask_scale)
    if grad.dtype in (torch.bfloat16, torch.float16) and has_fused_matmul():
        return torch.ops.npu.npu_fused_matmul(dz, a, x3=grad, fused_op_type="add")
    return torch.addmm(grad, dz, a)


def rank_gradients(grad: Tensor, z: Tensor, b: Tensor, dz: Tensor, db: Tensor) -> None:
    """Fill `dz`, (N, R), and `db`, (out, R): two products that read the gradient (N, out)."""
    dz.copy_(grad @ b.to(grad.dtype))
    db.copy_(grad.t() @ z)


def scale_gradient(sums: Tensor, scale: Tensor, b: Tensor, db: Tensor, saved_base: bool) -> Tensor:
    """(out,), from `colsum(grad * base)`, or from `colsum(grad * (y - bias))` where the output was saved."""
    return sums if saved_base else (sums - (b.to(sums.dtype) * db).sum(1)) / scale


@functools.cache
def has_fused_matmul() -> bool:
    """Whether the NPU has the matrix product that adds a tensor to its result: only the Ascend 950 does.

    On a 910B and a 910C torch_npu has the operator, but CANN has no kernel for it. What it adds has the dtype of the
    product, and float32 it multiplies in HF32 only. So it serves the gradient of the input in half precision, where the
    incoming gradient is added as it is; in the forward pass `scale * base` would have to be rounded first.
    """
    return torch.npu.get_device_name().startswith(("Ascend950", "Ascend910_95"))
