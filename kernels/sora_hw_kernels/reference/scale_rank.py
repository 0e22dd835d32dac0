"""`y = scale * base + z b^T + bias` and its gradients, and the same update of the gradient of a layer's input.

What costs here is traffic over (N, out), not arithmetic: R is small. Everything elementwise walks over blocks of rows
that stay in the cache, in the accumulation dtype (float32, or float64 for float64), and is rounded once. The skinny
products are the vendor's, in the dtype of the rows, which accumulate in float32 inside.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sora_hw.ops import empty_gradients

# One block in the accumulation dtype. Measured at out = 2048 on an x86-64 server part (1 MiB of second-level cache a
# core), bfloat16: 0.25 MiB costs 1.5 times the time of 1 to 2 MiB, 4 MiB up to 2.5 times.
_BLOCK_BYTES = 1024 * 1024


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    z_wide, b_t = z.to(dtype), b.to(dtype).t()
    for rows, (scratch,) in _row_blocks(base, dtype, buffers=1):
        block = y[rows] if y.dtype == dtype else scratch
        block.copy_(base[rows])
        if scale is not None:
            block.mul_(scale)
        block.addmm_(z_wide[rows], b_t)
        if bias is not None:
            block.add_(bias)
        if block is scratch:
            y[rows].copy_(block)
    return y


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
    """The gradients of base, z, b, scale and bias.

    The gradient of `scale` is `colsum(grad * base)`. Where only the output was saved, it follows without the base
    product as `(colsum(grad * (y - bias)) - rowsum(b * db)) / scale`.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dbase, dz, db, dscale, dbias = empty_gradients(grad, scale, z, b, bias, need_base)
    torch.mm(b.to(grad.dtype).t(), grad.t(), out=dz.t())
    db.copy_((z.t() @ grad).t())
    if bias is not None:
        dbias.copy_(grad.sum(0, dtype=dtype))
    if scale is None:
        return dbase, dz, db, dscale, dbias

    sums = torch.zeros(1, grad.shape[1], dtype=dtype, device=grad.device)
    for rows, (scratch, product) in _row_blocks(grad, dtype, buffers=2):
        g = grad[rows] if grad.dtype == dtype else scratch.copy_(grad[rows])
        product.copy_(saved[rows])
        if bias is not None and not saved_base:
            product.sub_(bias)
        sums.addmm_(torch.ones_like(g[:, :1]).t(), product.mul_(g))
        if need_base:
            dbase[rows].copy_(torch.mul(g, scale, out=product))
    sums = sums[0] if saved_base else (sums[0] - (b.to(dtype) * db).sum(1)) / scale
    dscale.copy_(sums)
    return dbase, dz, db, dscale, dbias


def input_gradient(grad: Tensor, dz: Tensor, a: Tensor, mask: Tensor | None, mask_scale: float) -> Tensor:
    """`grad + mask * mask_scale * (dz a)`, (N, in), of grad (N, in), dz (N, R), a (R, in), mask (N, in) or None."""
    if mask is None:
        return torch.addmm(grad, dz, a)
    total = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    for rows, (product,) in _row_blocks(grad, grad.dtype, buffers=1):
        torch.mm(dz[rows], a, out=product)
        torch.add(grad[rows], product.mul_(mask[rows]), alpha=mask_scale, out=total[rows])
    return total


def _row_blocks(t: Tensor, dtype: torch.dtype, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the rows of `t`, each with scratch blocks of its size, which are used again for the next slice."""
    rows, width = t.shape
    step = max(16, _BLOCK_BYTES // max(1, width * dtype.itemsize))
    scratch = [torch.empty(min(step, rows), width, dtype=dtype, device=t.device) for _ in range(buffers)]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), [block[: stop - start] for block in scratch]
